"""Selects the tests that this run of pytest can run; fixtures that all tests share.

`make test` runs pytest twice. The first run interprets the kernels and takes the tests that are not marked
`compiled`. The second run takes the tests marked `compiled`, which compile the kernels for GPUs; the machine
need not have a GPU.
"""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from interpreter import INTERPRETED

# These variables keep Ultralytics' settings and runs out of the user's home folder, and Ultralytics off the
# network. Ultralytics reads them when it is imported, so a fixture would set them too late.
_ultralytics_folder = tempfile.TemporaryDirectory(prefix="bra_triton_ultralytics_")
os.environ["YOLO_CONFIG_DIR"] = _ultralytics_folder.name
os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
# Inductor compiles in this process: otherwise it starts another for each core, and one that imports PyTorch.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# Without this package OpenVINO reports nothing to its makers; with it, every conversion forks a process for
# that, which takes two to four seconds.
sys.modules["openvino_telemetry"] = None


def pytest_unconfigure():
    """Removes Ultralytics' folder here: pytest-xdist's workers end without running exit handlers."""
    _ultralytics_folder.cleanup()


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        if "compiled" in item.keywords:
            return not INTERPRETED
        return INTERPRETED or torch.cuda.is_available()

    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    # The longest tests go first: if a worker started one last, the other workers would wait a minute for it.
    items[:] = sorted(filter(runs_here, items), key=lambda item: "test_inductor" not in item.name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32():
    """Turns TF32 off for cuDNN's convolutions, which compute the NCHW module's projections.

    By default PyTorch lets them round float32 to TF32.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def no_machine_code(monkeypatch, tmp_path):
    """Compiles kernels to Triton's intermediate code only, in an eighth of the time.

    That is enough where a stand-in for the driver gets the launches, because it runs no kernel, and where
    only the cache matters: its keys do not depend on the code.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    add_stages = CUDABackend.add_stages
    after = dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
    after |= dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)

    def add_the_first(self, stages, *arguments):
        add_stages(self, stages, *arguments)
        for name in ("ttgir", "llir", "ptx"):
            del stages[name]
        stages["cubin"] = lambda source, metadata: metadata.update(after, name="kernel") or b""

    monkeypatch.setattr(CUDABackend, "add_stages", add_the_first)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)  # so that no other test finds these kernels
        yield


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
