"""What the tests of launches share."""

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED
from launch_log import Log

from bra_triton.bench import stand_in


@pytest.fixture
def no_machine_code(monkeypatch, tmp_path):
    """Kernels are compiled to Triton's own code and no further, in an eighth of the time.

    That serves where a stand-in for the driver launches them, and runs none.
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
        knobs.cache.dir = str(tmp_path)  # where no other test finds such a kernel
        yield


@pytest.fixture
def log(monkeypatch, no_machine_code):
    """What is launched from now on, on a stand-in for the driver."""
    noted = Log()
    monkeypatch.setattr(
        stand_in._NoLauncher, "__call__", lambda self, *args: noted.launches.append((self, args))
    )
    with stand_in.without_gpu():
        yield noted


@pytest.fixture
def in_bounds(monkeypatch):
    """Every address that an interpreted kernel reads or writes lies in one of the arrays that it was given.

    A mask that is missing need not change a result: what is read past an array's end may not be used.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder, execute = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    starts = ends = np.zeros(0, np.uint64)

    def checked(access, mask_at):
        def check(pointers, *others):
            live = np.broadcast_to(others[mask_at].data, pointers.data.shape).astype(bool)
            touched = pointers.data[live]
            last = np.searchsorted(starts, touched, side="right") - 1
            past = touched[(last < 0) | (touched >= ends[last])]
            # Not asserted, whose message would hold all addresses.
            if past.size:
                raise IndexError(f"{past.size} of {touched.size} addresses lie outside all arrays")
            return access(pointers, *others)

        return check

    def execute_checked(self, *arguments, **options):
        nonlocal starts, ends
        extents = sorted(map(_extent, _tensors((arguments, tuple(options.values())))))
        starts = np.array([start for start, _ in extents], np.uint64)
        # Where arrays overlap, as slices of a packed map do, an address belongs to any that reaches so far.
        ends = np.maximum.accumulate(np.array([end for _, end in extents], np.uint64))
        execute(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", execute_checked)
    monkeypatch.setattr(builder, "create_masked_load", checked(builder.create_masked_load, 0))
    monkeypatch.setattr(builder, "create_masked_store", checked(builder.create_masked_store, 1))


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            yield argument


def _extent(x):
    """First address of an array, and the one past its last element."""
    last = sum((side - 1) * stride for side, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
