"""The wheel and the source distribution hold the package, all of it and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from typecheck import package_folders

ROOT = Path(__file__).resolve().parents[1]
# Files of the source distribution besides those of the package.
IN_SDIST = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "PKG-INFO"}
BUILD = "from setuptools import build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of files: in the source distribution, in the wheel, and those of the package that git tracks.

    Both distributions are built from the files that git tracks.
    """
    pytest.importorskip("setuptools", "77")  # pyproject.toml demands it; pip would fetch it
    tree = tmp_path_factory.mktemp("tree")
    listed = _run(["git", "ls-files"], cwd=ROOT)
    if listed.returncode:
        pytest.skip("no git repository, which would tell what belongs to the package")
    tracked = listed.stdout.split()
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    (tree / "kernels/forgotten.txt").write_text("not of the package")
    build = _run([sys.executable, "-c", BUILD], cwd=tree)
    assert build.returncode == 0, build.stderr
    sdist, wheel = (next((tree / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive if member.isfile()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    of_package = {name for name in tracked if name.startswith(tuple(f"{f}/" for f in _top_folders()))}
    return in_sdist, in_wheel, of_package


def _run(command, cwd=None):
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)


def _top_folders():
    return {folder.split("/")[0] for folder in package_folders(ROOT).values()}


def test_the_wheel_is_the_package(built):
    _, in_wheel, of_package = built
    folders = {folder: name.replace(".", "/") for name, folder in package_folders(ROOT).items()}
    installed = set()
    for name in of_package:
        folder = max((f for f in folders if name.startswith(f"{f}/")), key=len)
        installed.add(f"{folders[folder]}/{name.removeprefix(f'{folder}/')}")
    metadata = {name for name in in_wheel if ".dist-info/" in name}
    assert in_wheel - metadata == installed
    names = {name.split("/", 1)[1] for name in metadata}
    assert names == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"),
        *("licenses/LICENSE", "licenses/yolo_integration/yamls/LICENSE"),
    }


def test_the_source_distribution_is_the_package_and_what_builds_it(built):
    in_sdist, _, of_package = built
    metadata = {name for name in in_sdist if name.startswith("bra_triton.egg-info/")}
    assert in_sdist - metadata == of_package | IN_SDIST


def test_the_package_is_imported_and_attends_without_optional_packages():
    """Without Triton, Ultralytics and Matplotlib. The call does not initialize CUDA either."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('triton', 'ultralytics', 'matplotlib'))\n"
        "import torch, bra_triton\n"
        "module = bra_triton.BiLevelRoutingAttention(16, 1, 2, topk=2)\n"
        "module(torch.randn(1, 4, 4, 16)).sum().backward()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    run = _run([sys.executable, "-c", code])
    assert run.returncode == 0, run.stderr
    assert not run.stderr  # PyTorch's counter of operations would warn that there is no Triton
