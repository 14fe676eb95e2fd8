"""Plans: the kernel launches that serve one kind of call, decided once and run many times.

The grid, the compile-time numbers and the compiled kernel of a launch depend only on shapes, dtypes and
strides. A plan keeps them, and describes every array by its place: in one of the call's tensors, in an output
or in the workspace. To run the plan, the CPU makes one allocation for each output and one call for each
launch. Triton's own launcher would bind and look up every argument again: with it a training step of 12
launches took 162 us of the CPU's time; launched directly they take 5 us.

A kernel's parameters have this order: pointers, each one alone or in a group; run-time numbers; groups of
compile-time numbers. A group is a tuple.
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

# `Buffer.source` of arrays in the workspace and of arrays that are kept: both are at the end of a run's list
# of tensors.
_WORKSPACE, _KEPT = -1, -2
# Arrays in the workspace, and arrays that are kept, start at multiples of this many bytes: a cache line of
# the GPU.
_WORKSPACE_STEP = 128
# For pointers that are multiples of 16 bytes Triton compiles wider loads.
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
        inputs: the tensors of a call, or others like them; `run` gets tensors with the same shapes, strides
            and dtypes in the same order, and None where one is None here.
        device: device of the tensors.

    Attributes:
        inputs: the buffers of the inputs, in order; None where an input is None.
        launches: the launches, in order.
        workspace_bytes: size of the workspace.
        kept_bytes: size of all arrays that are kept.
        wanted: which of the optional outputs exist; set by the function that makes the plan.
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
        # `torch.empty_strided` takes three quarters of the time that `torch.empty` takes.
        self._allocate = partial(torch.empty_strided, device=device)

    @property
    def given(self) -> tuple[Buffer, ...]:
        """The inputs that are not None."""
        return tuple(x for x in self.inputs if x is not None)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype, zeroed: bool = False) -> Buffer:
        """An array that `run` allocates, fills with zeros if `zeroed`, and returns."""
        source = len(self.inputs) + len(self._outputs)
        self._outputs.append((Buffer(source, 0, shape, contiguous_strides(shape), dtype), zeroed))
        return self._outputs[-1][0]

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """An array that is dropped at the end of `run`."""
        start = self.workspace_bytes
        self.workspace_bytes += _rounded_bytes(shape, dtype)
        return Buffer(_WORKSPACE, start, shape, contiguous_strides(shape), dtype)

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """An array in the last output, a tensor of bytes, which a later plan reads through `Kept`."""
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
        """Adds a launch, unless its grid has no programs."""
        if min(grid) > 0:
            self.launches.append(Launch(kernel, grid, pointers, numbers, options))

    def run(self, *inputs: Tensor | None) -> list[Tensor]:
        """Runs the launches on the current stream, without waiting for the device.

        Returns:
            The outputs and, if the plan keeps arrays, the tensor of bytes that holds these.
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
            # The first run, which compiles the kernels; an address that is not aligned; or a launch hook.
            self._launch_by_triton(tensors)
            return
        addresses: list[int | None] = [None]
        addresses += [starts[source] + offset for source, offset in direct.places]
        launches = direct.on(direct.current_stream(self._index))
        for run, head, find, tail in launches:
            run(*head, *[pointers(addresses) for pointers in find], *tail)

    def _launch_by_triton(self, tensors: list[Tensor | None]) -> None:
        """Launches through Triton's own launcher, which takes tensors at all addresses and calls hooks."""
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
    """Finds the arrays that another plan has kept; both plans must take the same arrays in the same order.

    Args:
        holder: the other plan's last output, which is an input of this plan.
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
    """Compiled launches, which take addresses instead of tensors.

    Args:
        launches: the launches, in order.

    Attributes:
        places: source and offset of each array that the launches need. The getters of pointers take a list
            that begins with None, for pointers that are None; the address of each place follows.
        current_stream: function that asks the driver for the current stream of a device.
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
        # Kept, because Triton 3.8 unloads the machine code when a compiled kernel is deleted.
        self._compiled = [x.kernel.warmup(*x.arguments, grid=x.grid, **x.options) for x in launches]
        self._find = [tuple(map(find, launch.pointers)) for launch in launches]
        self._by_stream: dict[int, list[tuple[Any, ...]]] = Bounded()
        self.places = tuple(places)
        self.current_stream = driver.active.get_current_stream

    def on(self, stream: int) -> list[tuple[Any, ...]]:
        """For each launch: the function to call, its first arguments, getters of pointers, last arguments."""
        found = self._by_stream.get(stream)
        if found is None:
            found = self._by_stream[stream] = [
                self._call(*one, stream)
                for one in zip(self._launches, self._compiled, self._find, strict=True)
            ]
        return found

    @staticmethod
    def _call(launch: Launch, compiled: Any, find: tuple[Any, ...], stream: int) -> tuple[Any, ...]:
        run = compiled.run  # read before `function`: in Triton 3.4 this sets `function`
        # Metadata for hooks, enter hook, exit hook: all None, because a launch with hooks is not direct.
        hooks = (None, None, None)
        head = (*(*launch.grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, *hooks)
        return run, head, find, launch.numbers


def _rounded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    # At least one step, so that an array without elements has a place, too. Not with max(): it would compare
    # sizes, and a compiler that traces sizes as symbols would then take them for fixed.
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
    """Whether a launch hook is set, as profilers do; only Triton's own launcher calls hooks."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    # Since Triton 3.6 this is a chain of hooks, which may be empty.
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )
