"""The source by which the tile cache knows a kernel: its module and all modules that this one imports."""

import shutil
import subprocess
import sys

import pytest

from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import cache as tile_cache
from bra_triton.kernels.tiles import sources

FORWARD = "attention/forward.py"
BASE = {"lib/addressing.py", "lib/matrix.py"}


@pytest.fixture
def root(tmp_path):
    """A copy of `kernels` whose files may be changed."""
    return shutil.copytree(sources.ROOT, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize(
    ("kernel", "imported"),
    [
        (
            tiles.FORWARD,
            BASE | {"lib/exponential.py", "lepe/convolution.py", "routing/arguments.py", "arrays.py"},
        ),
        (tiles.QUERY_GRADIENT, BASE | {"lib/exponential.py"}),
        (tiles.KEY_VALUE_GRADIENT, BASE),
    ],
)
def test_a_kernel_is_made_of_what_it_imports(kernel, imported, root):
    module = f"attention/{kernel}.py"
    assert set(sources.source_files(module)) == {module, *imported}
    before = sources.digest(module, root)
    assert before == sources.digest(module) == tile_cache.source_digest(kernel)
    for name in (module, *imported):
        text = (root / name).read_text()
        (root / name).write_text(text + "# changed\n")
        assert sources.digest(module, root) != before, name
        (root / name).write_text(text)
    for other in ("routing/graph.py", "small_map/forward.py", "small_map/backward.py"):
        (root / other).write_text("")
    assert sources.digest(module, root) == before


@pytest.mark.parametrize(
    "line",
    [
        "from ..lib.extra import something",
        "from ..lib import extra",
        "from ..lib import matrix, extra as other",
        "from .. import lib, grid",
        "from ..lib.extra import *",
        "import bra_triton.kernels.lib.extra as extra",
        "from bra_triton.kernels.lib import extra",
        "def late():\n    from ..lib import extra",
    ],
)
def test_a_new_import_counts_and_so_does_what_it_imports(line, root):
    (root / "lib" / "__init__.py").write_text("from . import extra\n")
    (root / "lib" / "extra.py").write_text("import torch\nfrom .deeper import depth\n")
    (root / "lib" / "deeper.py").write_text("depth = 1\n")
    with (root / "lib" / "exponential.py").open("a") as file:
        file.write(f"\n\n{line}\n")
    assert {"lib/extra.py", "lib/deeper.py"} <= set(sources.source_files(FORWARD, root))
    before = sources.digest(FORWARD, root)
    (root / "lib" / "deeper.py").write_text("depth = 2\n")
    assert sources.digest(FORWARD, root) != before


def test_kernels_of_small_maps_take_no_tile_from_the_tables():
    """Hence no entry of the tables depends on the source of these kernels."""
    tables = "bra_triton.kernels.tiles"
    for module in (sources.ROOT / "small_map").glob("*.py"):
        names = sources.imported_names(module.read_text(), "bra_triton.kernels.small_map")
        assert {name for name in names if name.startswith(tables)} <= {f"{tables}.channel_block"}, module


def test_modules_that_import_each_other_are_read_once(root):
    with (root / "lib" / "matrix.py").open("a") as file:
        file.write("\n\nfrom ..attention import forward\n")
    assert "lib/matrix.py" in sources.source_files(FORWARD, root)


def test_line_ends_make_no_difference(root):
    before = sources.digest(FORWARD, root)
    (root / FORWARD).write_bytes((root / FORWARD).read_bytes().replace(b"\n", b"\r\n"))
    assert sources.digest(FORWARD, root) == before


def test_it_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None\nfrom bra_triton.kernels.tiles import cache\n"
    code += "print(cache.source_digest('forward'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tile_cache.source_digest(tiles.FORWARD)
