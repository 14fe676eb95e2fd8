"""Selects the tests that this run of pytest can do.

`make test` runs pytest twice: interpreted (everything but what is marked `compiled`), then compiled (the
tests so marked, which compile the kernels for GPUs that need not be there).
"""

import os
import shutil
import subprocess
import tempfile

import pytest
import torch
from interpreter import INTERPRETED

# Ultralytics reads them when it is imported, hence they are not set in a fixture: its settings and runs stay
# out of the user's home, and it looks for no network.
_ultralytics_folder = tempfile.TemporaryDirectory(prefix="bra_triton_ultralytics_")
os.environ["YOLO_CONFIG_DIR"] = _ultralytics_folder.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"


def pytest_unconfigure():
    """Not at the exit of the process, which pytest-xdist's workers leave out."""
    _ultralytics_folder.cleanup()


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        if "compiled" in item.keywords:
            return not INTERPRETED
        return INTERPRETED or torch.cuda.is_available()

    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    # The longest first: a worker that met it last would keep the others waiting for a minute.
    items[:] = sorted(filter(runs_here, items), key=lambda item: "test_inductor" not in item.name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32():
    """PyTorch lets cuDNN's convolutions, the NCHW module's projections, round float32 to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 16 KiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs root, and a Linux that lets it mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
