"""What kernels really load and store, counted element by element on the interpreter."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclass
class Traffic:
    """One launch.

    Attributes:
        kernel: its name.
        grid: programs along each axis.
        arguments: by name.
        requested: bytes that the programs loaded and stored.
        loaded: addresses that they loaded, by element size.
        stored: addresses that they stored, by element size.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    requested: int = 0
    loaded: dict[int, set[int]] = field(default_factory=dict)
    stored: dict[int, set[int]] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Bytes with every element counted once loaded and once stored."""
        return sum(size * len(found) for kept in (self.loaded, self.stored) for size, found in kept.items())

    def note(self, pointers: Any, mask: np.ndarray, kept: dict[int, set[int]]) -> None:
        """Adds one load or store."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        self.requested += size * addresses.size
        kept.setdefault(size, set()).update(addresses.ravel().tolist())


@contextmanager
def counted() -> Iterator[list[Traffic]]:
    """Counts every launch within, in order; needs `TRITON_INTERPRET=1`."""
    launches: list[Traffic] = []
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def counting_run(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(self.fn).parameters
        arguments = dict(zip(names, args, strict=False)) | kwargs
        launches.append(Traffic(self.fn.__name__, tuple(self.grid), arguments))
        return run(self, *args, **kwargs)

    def counting_load(self: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].note(pointers, mask.data, launches[-1].loaded)
        return load(self, pointers, mask, *rest)

    def counting_store(self: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].note(pointers, mask.data, launches[-1].stored)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", counting_run),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield launches
