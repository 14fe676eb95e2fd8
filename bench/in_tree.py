"""Runs a module with `bra_triton` imported from this working tree, without installation.

`python bench/in_tree.py bra_triton.bench.command_line check`, or `python bench/in_tree.py pytest tests`.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def install(root: Path = ROOT) -> None:
    """Imports the tree's `bra_triton` in this process, in the place of an installed copy."""
    folder = root / "bra_triton"
    # The folders beside `bra_triton` (`kernels`, `bench`, ...) are installed inside it: search both places.
    places = [str(folder), str(root)]
    spec = importlib.util.spec_from_file_location(
        "bra_triton", folder / "__init__.py", submodule_search_locations=places
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bra_triton"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def main(arguments: list[str]) -> None:
    """Runs the module `arguments[0]` with the rest as its command line."""
    if not arguments:
        raise SystemExit(f"usage: {sys.argv[0]} MODULE [ARGUMENT ...]")
    # Python put this file's folder first in the path: its `measure` and `host` would hide other modules.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench")]
    install()
    sys.argv = arguments
    # Without `alter_sys`, this file stays the main module; spawned processes import it as `__mp_main__`.
    runpy.run_module(arguments[0], run_name="__main__")


if __name__ == "__mp_main__":
    install()
if __name__ == "__main__":
    main(sys.argv[1:])
