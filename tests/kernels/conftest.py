"""Fixtures that the tests of launches share."""

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED
from launch_log import Log

from bra_triton.bench import stand_in


@pytest.fixture
def log(monkeypatch, no_machine_code):
    """A log of all launches from now on, which a stand-in for the driver gets."""
    noted = Log()
    monkeypatch.setattr(
        stand_in._NoLauncher, "__call__", lambda self, *args: noted.launches.append((self, args))
    )
    with stand_in.without_gpu():
        yield noted


@pytest.fixture
def in_bounds(monkeypatch):
    """Checks that an interpreted kernel reads and writes only addresses in the arrays that it was given.

    A comparison of results may not notice a missing mask: a kernel may read past an array's end and not use
    the values.
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
            # Not an assertion: its message would hold all addresses.
            if past.size:
                raise IndexError(f"{past.size} of {touched.size} addresses lie outside all arrays")
            return access(pointers, *others)

        return check

    def execute_checked(self, *arguments, **options):
        nonlocal starts, ends
        extents = sorted(map(_extent, _tensors((arguments, tuple(options.values())))))
        starts = np.array([start for start, _ in extents], np.uint64)
        # Arrays may overlap, as slices of a packed map do: at every start, the largest end so far counts.
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
