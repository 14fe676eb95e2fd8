"""Runs a module with `bra_triton` imported from this working tree, without installation.

`python bench/in_tree.py bra_triton.bench.command_line check`, or `python bench/in_tree.py pytest tests`.
Which folder is which package is read from pyproject.toml, as an installation does.
"""

import importlib.abc
import importlib.util
import re
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class InTreeFinder(importlib.abc.MetaPathFinder):
    """Finds the packages of the working tree at `root` where its pyproject.toml says that they are."""

    def __init__(self, root: Path) -> None:
        self.folders = {name: root / folder for name, folder in package_folders(root).items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package of that name; its modules are found through its own folder."""
        folder = self.folders.get(fullname)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def package_folders(root: Path) -> dict[str, str]:
    """Folder of every package, relative to the root; Python 3.10 has no parser of TOML."""
    table = (root / "pyproject.toml").read_text().split("[tool.setuptools.package-dir]\n")[1].split("\n[")[0]
    return dict(re.findall(r'^"([\w.]+)" = "([\w/]+)"$', table, re.MULTILINE))


def install(root: Path = ROOT) -> None:
    """Makes the tree's packages importable in this process, ahead of an installed copy."""
    if not any(isinstance(finder, InTreeFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, InTreeFinder(root))


def main(arguments: list[str]) -> None:
    """Runs the module `arguments[0]` with the rest as its command line."""
    if not arguments:
        raise SystemExit(f"usage: {sys.argv[0]} MODULE [ARGUMENT ...]")
    # Python put this file's folder first, where `measure` and `host` would hide others' modules.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench")]
    install()
    sys.argv = arguments
    # `sys.modules` stays as it is: to processes that this one spawns this file is the main one.
    runpy.run_module(arguments[0], run_name="__main__")


if __name__ == "__mp_main__":
    install()
if __name__ == "__main__":
    main(sys.argv[1:])
