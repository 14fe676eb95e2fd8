"""The Triton backend without a GPU, for measuring what a call costs the CPU.

A stand-in driver takes the place of CUDA's: kernels are compiled, looked up and called as on a card of
compute capability 9.0, and only the driver's own launch does nothing, so results are whatever memory held.
What the benches know of the package's choice of a backend, and of Triton's drivers, is in this file.
"""

import atexit
import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver

from bra_triton import functional
from bra_triton.backend import select
from bra_triton.bench.machine_code.hardware import BLOCK_SHARED_BYTES, HARDWARE
from bra_triton.call import Request
from bra_triton.kernels import calls

ARCH = "sm_90"


class _NoLauncher:
    launch_cooperative_grid = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        card = HARDWARE[ARCH]
        return {
            "max_shared_mem": BLOCK_SHARED_BYTES[ARCH],
            "multiprocessor_count": card.sms,
            "warpSize": 32,
            "max_num_regs": card.registers,
        }


class _Driver:
    """What Triton asks of a driver, answered without one."""

    def __init__(self, launcher_cls: type = _NoLauncher, utils: Any = None) -> None:
        self.launcher_cls, self.utils = launcher_cls, utils or _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def without_gpu(c_launcher: bool = False) -> Iterator[None]:
    """Within, the Triton backend serves tensors on the CPU, and its kernels do not run.

    Args:
        c_launcher: call Triton's launcher in C, with a stub in the place of the CUDA library; needs a C
            compiler.

    Raises:
        RuntimeError: Triton's interpreter is on, which launches nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels do not take Triton's launch path")
    # Reading the property `active` would look for a GPU; Triton 3.4 has a plain attribute of that name.
    slot = "_active" if hasattr(triton_driver, "_active") else "active"
    before = getattr(triton_driver, slot)
    triton_driver.set_active(_driver_of_c_launcher() if c_launcher else _Driver())
    _forget()
    try:
        with mock.patch.object(select.BACKENDS["triton"], "why_not", _no_reason):
            yield
    finally:
        setattr(triton_driver, slot, before)
        _forget()


def _no_reason(request: Request) -> None:
    """`why_not` of a backend that serves everything."""


def _forget() -> None:
    """Drops what was decided under another driver: who serves a call, and the kernels compiled for it."""
    functional._known.clear()
    calls.forget_plans()


def _driver_of_c_launcher() -> _Driver:
    from triton.backends.nvidia import driver

    folder = _load_stub_of_cuda(Path(driver.__file__).parent)
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.libcuda_path = str(folder)
        driver.library_dirs.cache_clear()
        driver.libcuda_dirs.cache_clear()
        real = driver.CudaUtils()
    stand_in = _Utils()
    real.load_binary, real.get_device_properties = stand_in.load_binary, stand_in.get_device_properties
    return _Driver(driver.CudaLauncher, real)


def _load_stub_of_cuda(sources: Path) -> Path:
    """Loads a CUDA library whose functions do nothing, as `libcuda.so.1`; returns its folder.

    Args:
        sources: folder of Triton's driver, which tells the functions that it calls.
    """
    text = "".join((sources / name).read_text() for name in ("driver.c", "driver.py"))
    names = {f"{name}{version}" for name in re.findall(r"\bcu[A-Z]\w+", text) for version in ("", "_v2")}
    folder = Path(tempfile.mkdtemp(prefix="bra_bench_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    flags = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True, capture_output=True)
    (folder / "libcuda.so").symlink_to(library)  # Triton 3.4 links by this name
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # a later dlopen of that name finds it
    return folder
