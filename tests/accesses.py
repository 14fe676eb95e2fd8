"""Checks where interpreted kernels read and write, which a comparison of results may not notice.

The interpreter runs the programs of a launch in order, each in one thread. On a GPU the programs run in any
order or at the same time, and so do the threads of a program between two barriers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

# A launch whose arrays take more bytes is checked for addresses outside of them alone.
_MOST_BYTES = 2**28


@contextmanager
def checked() -> Iterator[None]:
    """Context in which a kernel fails at an access that could fail, or give another result, on a GPU.

    The error names the fault: an address outside all arrays of the launch; an element that one program writes
    and another reads or writes; an element that a program reads after it wrote it, without a barrier between
    the two, although another of its threads may have written it.
    """
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    builder, execute = interpreter_builder, GridExecutor.__call__
    launch = _Launch(())

    def watched(access: Callable[..., Any], mask_at: int, note: str) -> Callable[..., Any]:
        def run(pointers: Any, *others: Any) -> Any:
            live = np.broadcast_to(others[mask_at].data, pointers.data.shape).astype(bool)
            launch.enter(builder.grid_idx)
            getattr(launch, note)(pointers.data[live])
            return access(pointers, *others)

        return run

    def execute_watched(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal launch
        launch = _Launch(_tensors((arguments, tuple(options.values()))))
        execute(self, *arguments, **options)

    def pass_barrier() -> None:
        launch.begin_stretch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", execute_watched)
        patch.setattr(builder, "create_barrier", pass_barrier)
        patch.setattr(builder, "create_masked_load", watched(builder.create_masked_load, 0, "read"))
        patch.setattr(builder, "create_masked_store", watched(builder.create_masked_store, 1, "write"))
        yield


class _Launch:
    """The arrays of a launch, and what its programs have read and written so far.

    The stretches between barriers, of all programs, are numbered from 1 on; `_first` is the first of the
    current program. For every byte at which an element starts, `_writer` holds the last stretch that wrote
    the element, and `_reader` the last that read it, or -1 if several programs did. 0 stands for none.
    """

    def __init__(self, arrays: Iterable[Tensor]) -> None:
        extents = sorted(map(_extent, arrays))
        self._starts = np.array([start for start, _ in extents], np.uint64)
        # Arrays may overlap, as slices of a packed map do: at every start, the largest end so far counts.
        self._ends = np.maximum.accumulate(np.array([end for _, end in extents], np.uint64))
        # Where the bytes of overlapping arrays are in `_writer` and `_reader`: at one distance from their
        # addresses.
        self._shifts = np.zeros(len(extents), np.uint64)
        n_bytes = 0
        for i, (start, end) in enumerate(zip(self._starts.tolist(), self._ends.tolist(), strict=True)):
            overlaps = i > 0 and start < int(self._ends[i - 1])
            self._shifts[i] = self._shifts[i - 1] if overlaps else start - n_bytes
            n_bytes = end - int(self._shifts[i])
        self._is_small = n_bytes <= _MOST_BYTES
        self._writer, self._reader = (np.zeros(n_bytes if self._is_small else 0, np.int32) for _ in range(2))
        self._program: tuple[int, ...] = ()
        self._stretch = self._first = 0

    def enter(self, program: tuple[int, ...]) -> None:
        if program != self._program:
            self._program = program
            self.begin_stretch()
            self._first = self._stretch

    def begin_stretch(self) -> None:
        self._stretch += 1

    def read(self, addresses: np.ndarray) -> None:
        at = self._places(addresses)
        writer, reader = self._writer[at], self._reader[at]
        _refuse((writer > 0) & (writer < self._first), "elements are read that another program has written")
        _refuse(writer == self._stretch, "elements are read after they were written, without a barrier")
        self._reader[at] = np.where((reader == 0) | (reader >= self._first), self._stretch, -1)

    def write(self, addresses: np.ndarray) -> None:
        at = self._places(addresses)
        writer, reader = self._writer[at], self._reader[at]
        _refuse(
            (writer > 0) & (writer < self._first), "elements are written that another program has written"
        )
        _refuse((reader != 0) & (reader < self._first), "elements are written that another program has read")
        self._writer[at] = self._stretch

    def _places(self, addresses: np.ndarray) -> np.ndarray:
        array = np.searchsorted(self._starts, addresses, side="right") - 1
        _refuse((array < 0) | (addresses >= self._ends[array]), "addresses lie outside all arrays")
        places = addresses - self._shifts[array]
        return places.astype(np.int64) if self._is_small else places[:0].astype(np.int64)


def _refuse(are_wrong: np.ndarray, fault: str) -> None:
    # Not an assertion: its message would hold all addresses.
    if are_wrong.any():
        raise IndexError(f"{are_wrong.sum()} of {are_wrong.size} {fault}")


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor) and argument.numel():
            yield argument


def _extent(x: Tensor) -> tuple[int, int]:
    """First address of an array, and the one past its last element."""
    last = sum((side - 1) * stride for side, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
