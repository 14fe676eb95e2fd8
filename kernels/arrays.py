"""What planning a launch needs to know of an array: a tensor, or the place of one. Needs no Triton."""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Array(Protocol):
    """What tensors and buffers have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each axis."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of an element."""

    def stride(self) -> tuple[int, ...]:
        """Elements from one index to the next, along each axis."""


A = TypeVar("A", Tensor, "Buffer")


@dataclass(frozen=True)
class Buffer:
    """Where a planned launch will find an array.

    Attributes:
        source: number of the tensor that holds it, see `plan.Plan`.
        offset: bytes from that tensor's first element to the array's.
        shape: elements along each axis.
        strides: elements from one index to the next, along each axis.
        dtype: type of an element.
    """

    source: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def stride(self) -> tuple[int, ...]:
        """`strides`, as tensors have it."""
        return self.strides

    def data_ptr(self) -> int:
        """Stands for the address, on whose alignment Triton specialises; what holds buffers is aligned."""
        return self.offset

    def ptr_range(self) -> int:
        """Asked by Triton for AMD; tensors of more than 2 GiB get no 32-bit addressing."""
        return 2**31 * self.dtype.itemsize

    def channels(self, start: int, stop: int) -> "Buffer":
        """A slice of the last axis, whose stride is 1."""
        return replace(
            self,
            offset=self.offset + start * self.dtype.itemsize,
            shape=(*self.shape[:-1], stop - start),
        )

    def view(self, *shape: int) -> "Buffer":
        """The same elements under another shape; the buffer is contiguous."""
        return replace(self, shape=shape, strides=contiguous_strides(shape))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous array."""
    strides: list[int] = []
    step = 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))


def channels(x: A, start: int, stop: int) -> A:
    """A slice of the last axis."""
    return x.channels(start, stop) if isinstance(x, Buffer) else x[..., start:stop]


def dense(x: Tensor) -> Tensor:
    """`x` with a contiguous tensor's strides, as a compiler expects an operator's result.

    `contiguous` leaves the strides of dimensions of one entry, and of empty tensors, as they are.
    """
    is_dense = x.stride() == contiguous_strides(tuple(x.shape))
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)
