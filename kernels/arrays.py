"""Arrays from which launches are planned: tensors, or buffers in their place. Does not import Triton."""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Array(Protocol):
    """The properties that tensors and buffers share."""

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
        source: position of the tensor that holds the array in a run's list of tensors, see `plan.Plan.run`.
        offset: bytes from that tensor's first element to the array's first element.
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
        """`strides`, under the name that tensors use."""
        return self.strides

    def data_ptr(self) -> int:
        """The offset, in place of the address: Triton asks for it and specialises a kernel on its alignment.

        The address has the same alignment, because the tensor that holds the buffer is aligned.
        """
        return self.offset

    def ptr_range(self) -> int:
        """At least 2 GiB, so that Triton's AMD backend, which asks for it, does not use 32-bit addressing.

        The compiled kernel then serves tensors of more than 2 GiB, too.
        """
        return 2**31 * self.dtype.itemsize

    def channels(self, start: int, stop: int) -> "Buffer":
        """A slice of the last axis, whose stride is 1."""
        return replace(
            self,
            offset=self.offset + start * self.dtype.itemsize,
            shape=(*self.shape[:-1], stop - start),
        )

    def view(self, *shape: int) -> "Buffer":
        """The same elements in another shape; the buffer must be contiguous."""
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
    """`x` with the strides of a contiguous tensor, which a compiler expects of an operator's result.

    `Tensor.contiguous` does not suffice: it keeps the strides of empty tensors and of axes of length 1.
    """
    is_dense = x.stride() == contiguous_strides(tuple(x.shape))
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)
