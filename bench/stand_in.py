"""Triton without a GPU: a stand-in for the driver.

Kernels are compiled, looked up and called as on the card that it stands for; only the launch does nothing, so
outputs are uninitialised memory. No other bench depends on Triton's drivers or on how a backend is chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import driver as triton_driver

from bra_triton import functional
from bra_triton.backend import select
from bra_triton.bench.machine_code.hardware import BLOCK_SHARED_BYTES, TARGETS
from bra_triton.call import Request
from bra_triton.kernels import calls

ARCH = "sm_90"


class _NoLauncher:
    launch_cooperative_grid = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def current_stream(device: Any = 0) -> int:
    """Address of the stream on which kernels are launched."""
    return 0


@contextmanager
def without_gpu() -> Iterator[None]:
    """Context in which the Triton backend serves tensors on the CPU, and its compiled kernels do not run."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels do not take Triton's launch path")
    with driver_of(ARCH):
        _forget()
        # Uninitialised memory may hold denormal numbers, whose products take a CPU many times as long.
        torch.set_flush_denormal(True)
        try:
            with mock.patch.object(select.BACKENDS["triton"], "why_not", _no_reason):
                yield
        finally:
            torch.set_flush_denormal(False)
            _forget()  # while there is a driver: Triton 3.8 unloads the code of a kernel that is dropped


@contextmanager
def driver_of(arch: str, device: Any = 0) -> Iterator[None]:
    """Context in which Triton finds a GPU of `arch`; it caches compiled kernels by the number `device`."""
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),  # module, function, registers, spills, most threads
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": BLOCK_SHARED_BYTES[arch]},
    )
    driver = SimpleNamespace(
        launcher_cls=_NoLauncher,
        utils=utils,
        get_current_target=lambda: TARGETS[arch],
        get_current_device=lambda: device,
        get_current_stream=lambda device=0: current_stream(device),
        set_current_device=lambda device: None,
        get_active_torch_device=lambda: torch.device("cpu"),
        map_python_to_cpp_type=str,
    )
    # Reading the property `active` looks for a GPU, so set `_active`; in Triton 3.4 `active` is an attribute.
    slot = "_active" if hasattr(triton_driver, "_active") else "active"
    with mock.patch.object(triton_driver, slot, driver):
        yield


def _no_reason(request: Request) -> None:
    """`why_not` of a backend that serves all calls. Not a mock: torch.compile would guard its attributes."""


def _forget() -> None:
    """Drops what was decided under another driver: the backend of each call, and plans with their kernels."""
    functional._known.clear()
    calls.forget_plans()
