"""The source of a kernel: its module and all that this imports from `kernels`. Does not import Triton."""

import ast
import hashlib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PACKAGE = __package__.rpartition(".")[0]


def digest(module: str, root: Path = ROOT) -> str:
    """Twelve hexadecimal digits, a digest of the text of `source_files`; line endings do not matter."""
    found = hashlib.sha256()
    for name, text in sorted(source_files(module, root).items()):
        found.update(f"{name}\0{text}\0".encode())
    return found.hexdigest()[:12]


def source_files(module: str, root: Path = ROOT) -> dict[str, str]:
    """The text, by file name, of a module and of the modules that it imports, directly or indirectly.

    Args:
        module: path of the module's file relative to `root`, such as "attention/forward.py".
        root: the folder `kernels`.
    """
    texts: dict[str, str] = {}
    left = [module]
    while left:
        name = left.pop()
        if name not in texts:
            texts[name] = (root / name).read_text(encoding="utf-8")
            package = ".".join([_PACKAGE, *name.split("/")[:-1]])
            left += [file for found in imported_names(texts[name], package) for file in _files(found, root)]
    return texts


def imported_names(source: str, package: str) -> set[str]:
    """The full names that a module imports: "a.b" for `import a.b`, "a.b.c" for `from a.b import c`.

    Args:
        source: the module's text.
        package: full name of the package that contains the module.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _files(name: str, root: Path) -> Iterator[str]:
    """Files in `kernels` that may define a name: its own file, if it is a module, and its parent's file."""
    for module in (name, name.rpartition(".")[0]):
        if f"{module}.".startswith(f"{_PACKAGE}."):
            path = module.removeprefix(_PACKAGE).removeprefix(".").replace(".", "/")
            candidates = (f"{path}.py", f"{path}/__init__.py".removeprefix("/"))
            yield from (file for file in candidates if (root / file).is_file())
