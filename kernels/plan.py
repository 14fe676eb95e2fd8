"""Plans: the launches that serve one kind of call, decided once, then run with little more than addresses.

Grids, compile-time numbers and compiled kernels of a launch depend on shapes, types and strides alone. A plan
keeps them, and describes every array by where it will be found: in one of the call's tensors, in an output or
in the workspace. Running it then costs the CPU an allocation an output and one call a launch. Through
Triton's own launcher, which binds and looks up every argument anew, a training step of 12 launches took
162 us of the CPU's time; directly the same launches take 5 us, and 21 us with the C launcher's part.

A kernel's parameters stand in this order: pointers, each one alone or in a group; run-time numbers; the
compile-time numbers as one group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import itemgetter, or_
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

from .arrays import Buffer, contiguous_strides

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
        self._outputs: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
        self._places: tuple[tuple[int, int], ...] = ()
        self._direct: list[_DirectLaunch] = []
        self._current_stream: Any = None
        self._compiling = Lock()
        self._index = (device.index or 0) if device.type == "cuda" else 0

    @property
    def given(self) -> tuple[Buffer, ...]:
        """The inputs that are not None."""
        return tuple(x for x in self.inputs if x is not None)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype, zeroed: bool = False) -> Buffer:
        """An array that `run` allocates, fills with zeros if asked for, and returns."""
        self._outputs.append((shape, dtype, zeroed))
        return Buffer(len(self.inputs) + len(self._outputs) - 1, 0, shape, contiguous_strides(shape), dtype)

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
        for shape, dtype, zeroed in self._outputs:
            allocate = torch.zeros if zeroed else torch.empty
            tensors.append(allocate(shape, dtype=dtype, device=self.device))
        for n_bytes in (self.kept_bytes, self.workspace_bytes):
            tensors.append(torch.empty(n_bytes, dtype=torch.uint8, device=self.device) if n_bytes else None)
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
        if reduce(or_, starts) % _ALIGNMENT or _is_watched() or not self._compile():
            self._launch_by_triton(tensors)
            return
        addresses: list[int | None] = [None]
        addresses += [starts[source] + offset for source, offset in self._places]
        stream = self._current_stream(self._index)
        for launch in self._direct:
            launch(stream, addresses)

    def _compile(self) -> bool:
        """Whether launches can be made directly; compiles them where that has not been done."""
        if len(self._direct) < len(self.launches):
            if any(not isinstance(launch.kernel, JITFunction) for launch in self.launches):
                return False  # under the interpreter
            with self._compiling:
                places: dict[tuple[int, int], int] = {}
                direct = [_DirectLaunch(launch, places) for launch in self.launches]
                self._places, self._current_stream = tuple(places), driver.active.get_current_stream
                self._direct = direct
        return True

    def _launch_by_triton(self, tensors: list[Tensor | None]) -> None:
        """Launches as any Triton kernel is, with tensors for arguments: whatever the addresses and hooks."""
        for launch in self.launches:
            launch.kernel[launch.grid](
                *(_materialise(pointers, tensors) for pointers in launch.pointers),
                *launch.numbers,
                **launch.options,
            )


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


class _DirectLaunch:
    """A compiled launch, called with the stream and the addresses of a run.

    Args:
        launch: what to launch.
        places: where to enter the arrays that it needs, (source, offset): position among the addresses, of
            which the first is None.
    """

    __slots__ = ("_arguments", "_compiled", "_grid", "_head", "_run", "_tail")

    def __init__(self, launch: Launch, places: dict[tuple[int, int], int]) -> None:
        def position(buffer: Buffer | None) -> int:
            if buffer is None:
                return 0
            return places.setdefault((buffer.source, buffer.offset), len(places) + 1)

        self._arguments = tuple(
            itemgetter(*map(position, pointers))
            if isinstance(pointers, tuple)
            else itemgetter(position(pointers))
            for pointers in launch.pointers
        )
        # Kept, since Triton 3.8 unloads the code with it.
        self._compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        self._run = self._compiled.run  # before `function`, which Triton 3.4 fills in when this is read
        self._grid = (*launch.grid, 1, 1)[:3]
        self._head = self._head_on(0)
        self._tail = launch.numbers

    def _head_on(self, stream: int) -> tuple[Any, ...]:
        """The launcher's arguments before the kernel's own."""
        compiled = self._compiled
        # Metadata for hooks, and the hooks of a launch: there are none, or it would not be direct.
        return (*self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None)

    def __call__(self, stream: int, addresses: Sequence[int | None]) -> None:
        head = self._head
        if head[3] != stream:
            self._head = head = self._head_on(stream)
        self._run(*head, *[find(addresses) for find in self._arguments], *self._tail)


def _rounded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    n_bytes = prod(shape) * dtype.itemsize
    return -(-n_bytes // _WORKSPACE_STEP) * _WORKSPACE_STEP


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
