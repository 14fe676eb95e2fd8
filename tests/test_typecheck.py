"""The type check of `make lint` sees types across folders; every dependency between them has a wrong call."""

import textwrap
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest
import typecheck

from bra_triton.kernels.tiles.sources import imported_names

LAYERS = ["bench", "yolo_integration", "bra_triton", "kernels"]  # each imports only from those after it
WRONG_CALLS = {("house", "cellar"): ("from house.cellar.wine import pour", "pour('red')")}


@pytest.fixture
def tree(tmp_path):
    """A project whose folder `cellar` is installed inside the package `house`."""
    files = {
        "pyproject.toml": """
            [tool.setuptools.package-dir]
            "house" = "house"
            "house.cellar" = "cellar"
            """,
        "house/__init__.py": "",
        "house/kitchen.py": "from .cellar.wine import pour\npour(3)\n",
        "house/py.typed": "",
        "cellar/__init__.py": "",
        "cellar/wine.py": "def pour(glasses: int) -> None: ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


def imported_folders(folder):
    """The other top-level folders that a folder's modules import from."""
    packages = typecheck.package_folders(typecheck.ROOT)
    found = set()
    for package, path in packages.items():
        for file in (typecheck.ROOT / path).glob("*.py"):
            if path.split("/")[0] == folder:
                found |= imported_names(file.read_text(encoding="utf-8"), package)
    # Several packages contain a name: "bra_triton.kernels.grid" in "bra_triton" and in "bra_triton.kernels".
    around = [[package for package in packages if f"{name}.".startswith(f"{package}.")] for name in found]
    return {packages[max(names, key=len)].split("/")[0] for names in around if names} - {folder}


@pytest.mark.parametrize("folder", LAYERS)
def test_every_seam_has_a_wrong_call_and_dependencies_point_one_way(folder):
    imported = imported_folders(folder)
    assert imported == {called for caller, called in typecheck.WRONG_CALLS if caller == folder}
    assert imported <= set(LAYERS[LAYERS.index(folder) + 1 :])


def test_dependencies_inside_kernels_point_one_way():
    """Between its folders and the files beside them; `static_order` raises an error that names a cycle."""
    kernels = "bra_triton.kernels."
    imported = defaultdict(set)
    for package, path in typecheck.package_folders(typecheck.ROOT).items():
        for file in (typecheck.ROOT / path).glob("*.py") if f"{package}.".startswith(kernels) else ():
            names = imported_names(file.read_text(encoding="utf-8"), package)
            own = f"{package}.{file.stem}".split(".")[2]
            imported[own] |= {name.split(".")[2] for name in names if name.startswith(kernels)} - {own}
    assert {"lib", "plan"} < imported["attention"]
    assert set(TopologicalSorter(imported).static_order()) == set(imported)


def test_a_wrong_call_in_the_tree_is_found_under_the_name_of_the_checkout(tree):
    assert typecheck.check(tree, "house", WRONG_CALLS) == []
    (tree / "cellar" / "shelf.py").write_text("from house.cellar.wine import pour\n\npour(glasses='3')\n")
    (tree / "house" / "kitchen.py").write_text("from .cellar import wine\nwine.pour()\n")
    found = typecheck.check(tree, "house", WRONG_CALLS)
    assert [line.split(": ")[0] for line in sorted(found)] == ["cellar/shelf.py:3", "house/kitchen.py:2"]
    assert "[arg-type]" in min(found)
    assert "[call-arg]" in max(found)


def test_a_seam_that_mypy_does_not_see_through_is_found(tree):
    wine = tree / "cellar" / "wine.py"
    wine.write_text("from typing import Any\n\npour: Any = print\n")
    (found,) = typecheck.check(tree, "house", WRONG_CALLS)
    assert found == "house -> cellar: mypy does not report the wrong call in wrong_call_of_cellar.py"
    wine.write_text("")  # the import is wrong now, not the call
    (tree / "house" / "kitchen.py").unlink()
    assert len(typecheck.check(tree, "house", WRONG_CALLS)) == 2


def test_a_check_that_does_not_run_is_found(tree):
    (tree / "house" / "kitchen.py").write_text("def (:\n")
    found = typecheck.check(tree, "house", WRONG_CALLS)
    assert found[0].startswith("house/kitchen.py:1: error: ")
    assert found[-1] == "mypy stopped with exit status 2"
    assert not any(line.startswith("house -> cellar") for line in found)
