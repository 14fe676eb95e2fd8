"""The Triton backend without a GPU, for measuring what a call costs the CPU.

A stand-in driver takes the place of CUDA's: kernels are compiled, looked up and called as on a card of
compute capability 9.0, and only the driver's own launch does nothing, so results are whatever memory held.
What the benches know of the package's choice of a backend, and of Triton's drivers, is in this file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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

    def unload_module(self, module: int) -> None:
        pass

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

    launcher_cls, utils = _NoLauncher, _Utils()

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
def without_gpu() -> Iterator[None]:
    """Within, the Triton backend serves tensors on the CPU, and its kernels do not run.

    Raises:
        RuntimeError: Triton's interpreter is on, which launches nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels do not take Triton's launch path")
    # Reading the property `active` would look for a GPU; Triton 3.4 has a plain attribute of that name.
    slot = "_active" if hasattr(triton_driver, "_active") else "active"
    before = getattr(triton_driver, slot)
    triton_driver.set_active(_Driver())
    _forget()
    try:
        with mock.patch.object(select.BACKENDS["triton"], "why_not", _no_reason):
            yield
    finally:
        _forget()  # while there is a driver: Triton 3.8 unloads a kernel's code when it is dropped
        setattr(triton_driver, slot, before)


def _no_reason(request: Request) -> None:
    """`why_not` of a backend that serves everything; of a mock torch.compile would guard every attribute."""


def _forget() -> None:
    """Drops what was decided under another driver: who serves a call, and the kernels compiled for it."""
    functional._known.clear()
    calls.forget_plans()
