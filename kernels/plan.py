"""Plans: the launches that serve one kind of call, decided once, then run with little more than addresses.

Grids, compile-time numbers and compiled kernels of a launch depend on shapes, types and strides alone. A plan
keeps them, and describes every array by where it will be found: in one of the call's tensors, in an output or
in the workspace. Running it then costs the CPU an allocation an output and one call a launch. Through
Triton's own launcher, which binds and looks up every argument anew, a training step of 12 launches took
162 us of the CPU's time; directly the same launches take 5 us.

A kernel's parameters stand in this order: pointers, each one alone or in a group; run-time numbers; the
compile-time numbers as one group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from operator import itemgetter, or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

from . import code_cache
from .arrays import Buffer, contiguous_strides
from .bounded import Bounded

# Sources of the buffers in a plan's workspace and among what it keeps: the last of the tensors it runs with.
_WORKSPACE, _KEPT = -1, -2
# Arrays in the workspace start at multiples of so many bytes: a cache line of the GPU.
_WORKSPACE_STEP = 128
# Triton compiles pointers that are multiples of 16 bytes with wider loads.
_ALIGNMENT = 16

_runtime = triton.knobs.runtime

Pointers = Buffer | None | tuple[Buffer | None, ...]
Take = Callable[[tuple[int, ...], torch.dtype], Buffer]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along each axis, at most three.
        pointers: leading arguments, in the order of the kernel's parameters.
        numbers: the remaining arguments, in order.
        options: `num_warps` and `num_stages`.
    """

    kernel: Any
    grid: tuple[int, ...]
    pointers: tuple[Pointers, ...]
    numbers: tuple[Any, ...]
    options: dict[str, int]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments, in the order of the kernel's parameters."""
        return (*self.pointers, *self.numbers)

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return str(self.kernel.fn.__name__)


class Plan:
    """Launches, in order, and the arrays that they read and write.

    Args:
        inputs: the tensors of a call, or others like them; `run` gets as many in the same order, with the
            same shapes, strides and dtypes.
        device: where they lie.

    Attributes:
        inputs: the buffers of the inputs, in order; None for one that is not there.
        launches: the launches, in order.
        workspace_bytes: size of the workspace.
        kept_bytes: size of what is kept.
        wanted: a note of the plan's maker, who has optional outputs: which of them there are.
    """

    def __init__(self, inputs: Sequence[Tensor | None], device: torch.device) -> None:
        self.device = device
        self.inputs = tuple(
            None if x is None else Buffer(i, 0, tuple(x.shape), tuple(x.stride()), x.dtype)
            for i, x in enumerate(inputs)
        )
        self.launches: list[Launch] = []
        self.wanted: list[bool] = []
        self.workspace_bytes = self.kept_bytes = 0
        self._outputs: list[tuple[Buffer, bool]] = []
        self._direct: _DirectLaunches | None = None
        self._index = (device.index or 0) if device.type == "cuda" else 0
        # In three quarters of the time that `torch.empty` takes.
        self._allocate = partial(torch.empty_strided, device=device)

    @property
    def given(self) -> tuple[Buffer, ...]:
        """The inputs that are not None."""
        return tuple(x for x in self.inputs if x is not None)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype, zeroed: bool = False) -> Buffer:
        """An array that `run` allocates, fills with zeros if asked for, and returns."""
        source = len(self.inputs) + len(self._outputs)
        self._outputs.append((Buffer(source, 0, shape, contiguous_strides(shape), dtype), zeroed))
        return self._outputs[-1][0]

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """An array that is dropped at the end of `run`."""
        start = self.workspace_bytes
        self.workspace_bytes += _rounded_bytes(shape, dtype)
        return Buffer(_WORKSPACE, start, shape, contiguous_strides(shape), dtype)

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """An array in the last output, of bytes, which a later plan reads through `Kept`."""
        start = self.kept_bytes
        self.kept_bytes += _rounded_bytes(shape, dtype)
        return Buffer(_KEPT, start, shape, contiguous_strides(shape), dtype)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        pointers: tuple[Pointers, ...],
        numbers: tuple[Any, ...],
        **options: int,
    ) -> None:
        """Adds a launch; one without programs is left out."""
        if min(grid) > 0:
            self.launches.append(Launch(kernel, grid, pointers, numbers, options))

    def run(self, *inputs: Tensor | None) -> list[Tensor]:
        """Runs the launches on the current stream, without waiting for the device.

        Returns:
            The outputs and, if there is any, what is kept.
        """
        tensors: list[Tensor | None] = [*inputs]
        allocate = self._allocate
        for x, zeroed in self._outputs:
            made = allocate(x.shape, x.strides, dtype=x.dtype)
            tensors.append(made.zero_() if zeroed else made)
        for n_bytes in (self.kept_bytes, self.workspace_bytes):
            tensors.append(allocate((n_bytes,), (1,), dtype=torch.uint8) if n_bytes else None)
        if self.device.type == "cuda" and driver.active.get_current_device() != self._index:
            with torch.cuda.device(self._index):
                self._launch(tensors)
        else:
            self._launch(tensors)
        outputs: list[Any] = tensors[len(inputs) : len(tensors) - (1 if self.kept_bytes else 2)]
        return outputs

    def _launch(self, tensors: list[Tensor | None]) -> None:
        if not self.launches:
            return  # an empty batch
        starts = [0 if x is None else x.data_ptr() for x in tensors]
        direct = self._direct
        if direct is None or reduce(or_, starts) % _ALIGNMENT or _is_watched():
            # A call of another kind, or the first one, which compiles the kernels.
            self._launch_by_triton(tensors)
            return
        addresses: list[int | None] = [None]
        addresses += [starts[source] + offset for source, offset in direct.places]
        launches = direct.on(direct.current_stream(self._index))
        for run, head, find, tail in launches:
            run(*head, *[pointers(addresses) for pointers in find], *tail)

    def _launch_by_triton(self, tensors: list[Tensor | None]) -> None:
        """Launches as any Triton kernel is, with tensors for arguments: whatever the addresses and hooks."""
        for launch in self.launches:
            code_cache.compiling(
                launch.kernel[launch.grid],
                *(_materialise(pointers, tensors) for pointers in launch.pointers),
                *launch.numbers,
                **launch.options,
            )
        if self._direct is None and all(isinstance(launch.kernel, JITFunction) for launch in self.launches):
            self._direct = code_cache.compiling(_DirectLaunches, self.launches)


class Kept:
    """Reads what another plan has kept: the same arrays, taken in the same order.

    Args:
        holder: the other plan's last output, as an input of this one.
    """

    def __init__(self, holder: Buffer) -> None:
        self._holder = holder
        self._start = holder.offset

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """The next array."""
        start = self._start
        self._start += _rounded_bytes(shape, dtype)
        return Buffer(self._holder.source, start, shape, contiguous_strides(shape), dtype)


class _DirectLaunches:
    """Compiled launches, to be called with addresses alone.

    Args:
        launches: what to launch.

    Attributes:
        places: the arrays that they need, (source, offset). Their addresses follow a None.
        current_stream: asks the driver for the current stream of a device.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        places: dict[tuple[int, int], int] = {}

        def position(buffer: Buffer | None) -> int:
            if buffer is None:
                return 0
            return places.setdefault((buffer.source, buffer.offset), len(places) + 1)

        def find(pointers: Pointers) -> Callable[[Sequence[int | None]], Any]:
            group = pointers if isinstance(pointers, tuple) else (pointers,)
            return itemgetter(*map(position, group))

        self._launches = launches
        # Kept, since Triton 3.8 unloads the code with them.
        self._compiled = [x.kernel.warmup(*x.arguments, grid=x.grid, **x.options) for x in launches]
        self._find = [tuple(map(find, launch.pointers)) for launch in launches]
        self._by_stream: dict[int, list[tuple[Any, ...]]] = Bounded()
        self.places = tuple(places)
        self.current_stream = driver.active.get_current_stream

    def on(self, stream: int) -> list[tuple[Any, ...]]:
        """Per launch: what to call, the arguments before the kernel's own, getters of pointers, the rest."""
        found = self._by_stream.get(stream)
        if found is None:
            found = self._by_stream[stream] = [
                self._call(*one, stream)
                for one in zip(self._launches, self._compiled, self._find, strict=True)
            ]
        return found

    @staticmethod
    def _call(launch: Launch, compiled: Any, find: tuple[Any, ...], stream: int) -> tuple[Any, ...]:
        run = compiled.run  # before `function`, which Triton 3.4 fills in when this is read
        # Metadata for hooks, and the hooks of a launch: there are none, or it would not be direct.
        hooks = (None, None, None)
        head = (*(*launch.grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, *hooks)
        return run, head, find, launch.numbers


def _rounded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    # More than none for an array without elements, so that something holds it. Not max(), by which a compiler
    # would take sizes that it traces for fixed.
    return (prod(shape) * dtype.itemsize // _WORKSPACE_STEP + 1) * _WORKSPACE_STEP


def _materialise(pointers: Pointers, tensors: Sequence[Tensor | None]) -> Any:
    if isinstance(pointers, Buffer):
        holder = tensors[pointers.source]
        assert holder is not None
        first = holder.storage_offset() * holder.element_size() + pointers.offset
        view = torch.empty(0, dtype=pointers.dtype, device=holder.device)
        storage = holder.untyped_storage()
        return view.set_(storage, first // pointers.dtype.itemsize, pointers.shape, pointers.strides)
    if isinstance(pointers, tuple):
        members = [_materialise(member, tensors) for member in pointers]
        return type(pointers)(*members) if hasattr(pointers, "_fields") else tuple(members)
    return pointers


def _is_watched() -> bool:
    """Whether someone wants to be told of launches, as profilers do, which only Triton's launcher does."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    # Since Triton 3.6 a hook is a chain, in which there may be none.
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )
