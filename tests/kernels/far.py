"""Runs plans for so many images that arrays pass 2**31 elements: programs of the first and last image only.

Addresses are reserved for whole arrays, but only the pages that are touched take memory.
"""

import mmap
from contextlib import contextmanager
from math import prod

import pytest
import torch
from triton.runtime import interpreter

from bra_triton.kernels.plan import _materialise

# Bytes reserved before and after every array. An offset that is truncated to 32 bits then stays in reserved
# memory, and the wrong value found there shows the error.
_MARGIN = 2**34
# At least the number of programs that one image has in any launch.
PROGRAMS = 12
MAP_NORESERVE = 0x4000


def reserve(shape, dtype):
    """An array of zeros, none of it in memory yet; skips the test if the addresses cannot be reserved."""
    n_bytes = prod(shape) * dtype.itemsize
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, n_bytes + 2 * _MARGIN, flags=flags)
    except OSError:
        pytest.skip(f"no {n_bytes / 2**40:.1f} TiB of addresses")
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=_MARGIN).view(shape)


def far(x, images):
    """A reserved batch whose last image is the image of `x`; None for None."""
    if x is None:
        return None
    batch = reserve((images, *x.shape[1:]), x.dtype)
    batch[-1] = x[0]
    return batch


def run(plan, inputs, first_block=False):
    """Runs a plan as `Plan.run` does, but only the first and the last `PROGRAMS` programs of every launch.

    Along axis 1 (blocks of channels) all programs run or, with `first_block`, only the first.
    """
    outputs = [reserve(x.shape, x.dtype) for x, _ in plan._outputs]
    sizes = (plan.kept_bytes, plan.workspace_bytes)
    tensors = [*inputs, *outputs, *(reserve((size + 1,), torch.uint8) for size in sizes)]
    for launch in plan.launches:
        if launch.name == "pool_weight_gradient_kernel" and not first_block:
            continue  # each of its programs sums over very many images
        arguments = (*(_materialise(pointers, tensors) for pointers in launch.pointers), *launch.numbers)
        first, *rest = launch.grid
        if first_block and rest:
            rest[0] = 1
        starts = {0, max(0, first - PROGRAMS)}
        if launch.name == "finish_gradients_kernel" and not first_block:
            # Its first `n_sums` programs sum over all images, which would take too long.
            n_sums = launch.numbers[launch.kernel.arg_names.index("n_sums") - len(launch.pointers)]
            starts = {max(n_sums, first - PROGRAMS)}
        for start in starts:
            n_programs = min(PROGRAMS, first - start)
            with programs_from(start):
                launch.kernel[(n_programs, *rest)](*arguments, **launch.options)
    return outputs + ([tensors[-2]] if plan.kept_bytes else [])


@contextmanager
def programs_from(start):
    """Context in which the interpreter numbers programs from `start` and does not copy tensors back."""
    with pytest.MonkeyPatch.context() as patch:
        builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
        patch.setattr(
            builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (start + x, y, z))
        )
        patch.setattr(executor, "_restore_args_dev", lambda *_: None)  # it copies whole arrays
        yield
