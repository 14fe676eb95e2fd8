"""What the package would launch on a GPU, recorded without one, ready to be compiled.

The launches themselves run, on tensors without data, and only the last step is replaced: where a kernel would
start, its arguments are noted. So tiles, warps and types are those of a real launch, not a second list.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import JITFunction

from bra_triton.bench.machine_code.static_analysis import KernelSpecimen
from bra_triton.bench.problems import Problem
from bra_triton.kernels.attention import launch as attention
from bra_triton.kernels.lepe import launch as lepe_launches
from bra_triton.kernels.pooling import launch as pooling
from bra_triton.kernels.pooling.problem import WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Gradients, Lepe, Padding, RoutedAttention
from bra_triton.kernels.routing import launch as routing

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_COMPILER_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        specimen: what the compiler is given.
        grid: programs along each axis.
        arguments: by name, compile-time ones included; tensors have no data.
    """

    specimen: KernelSpecimen
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    @property
    def programs(self) -> int:
        """Thread blocks of the launch."""
        return math.prod(self.grid)

    @property
    def is_masked(self) -> bool:
        """Whether an attention kernel gives every query all keys, under a mask."""
        return self.arguments.get("marks") is not None

    @property
    def bytes_of_arguments(self) -> int:
        """What its tensors hold, each counted once: about what the launch has to move."""
        tensors = {id(x): x for _, x in _tensors(self.arguments)}
        return sum(x.numel() * x.element_size() for x in tensors.values())


def record(run: Callable[[], object]) -> list[Launch]:
    """What `run` launches, in order, without launching it.

    Raises:
        TypeError: under `TRITON_INTERPRET=1`, where kernels are not compiled.
    """
    launches: list[Launch] = []

    def note(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: launches.append(_launch(kernel, grid, args, kwargs))

    with mock.patch.object(JITFunction, "__getitem__", note):
        run()
    if not launches:
        raise TypeError("no compiled kernel was launched; is TRITON_INTERPRET set?")
    return launches


def record_kernels(run: Callable[[], object]) -> list[KernelSpecimen]:
    """The kernels that `run` launches, in order; see `record`."""
    return [launch.specimen for launch in record(run)]


def record_attention(problem: Problem, dtype: torch.dtype) -> list[Launch]:
    """Every launch of one forward and backward of an attention, routing and pooling included.

    Raises:
        TypeError: under `TRITON_INTERPRET=1`, where kernels are not compiled.
    """
    routed, qkv, padding = _empty_problem(problem, dtype)
    gradients = Gradients(*torch.empty_like(qkv).split(_widths(problem), dim=-1))
    if routed.key.shape[1:3] != routed.query.shape[1:3]:
        kv = torch.cat([routed.key, routed.value], -1)
        gradients = Gradients(gradients.query, *kv.split(_widths(problem)[1:], dim=-1))
    needs_factor = problem.routing_weight != "none"
    routed = routed.merged() if problem.chooses_all else routed
    lepe = _lepe(problem, qkv, padding)
    reduction = _pooling(problem, qkv.device)

    def run() -> None:
        if reduction is not None:
            _pool(reduction, qkv[..., problem.qk_dim :], padding, problem)
        if not problem.chooses_all:
            means = routing.region_means(qkv, padding, problem.grid, 2 * problem.qk_dim)
            query, key = means.split(problem.qk_dim, dim=-1)
            r_weight, r_idx = routing.route(query, key, problem.topk, routed.scale)
        out, _, lse = attention.attention_forward(routed, lepe)
        attention.attention_backward(torch.empty_like(out), routed, out, lse, gradients, needs_factor)
        if lepe is not None:
            lepe_launches.lepe_backward(out, gradients.value, lepe)
        if needs_factor:
            routing.route_backward(r_weight, r_weight, r_idx, query, key, routed.scale)

    return record(run)


def _widths(problem: Problem) -> list[int]:
    return [problem.qk_dim, problem.qk_dim, problem.dim]


def _empty_problem(problem: Problem, dtype: torch.dtype) -> tuple[RoutedAttention, Tensor, Tensor | None]:
    """The attention on tensors without data, its packed projection and the projection of padding."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    grid, kv_grid, widths = problem.grid, problem.kv_grid, _widths(problem)
    qkv = empty(problem.batch, problem.height, problem.width, sum(widths))
    query, key, value = qkv.split(widths, dim=-1)
    if kv_grid is not grid and problem.kv_per_win is not None:
        key, value = empty(problem.batch, kv_grid.height, kv_grid.width, sum(widths[1:])).split(
            widths[1:], -1
        )
    n_graphs = problem.num_heads if problem.head_graphs else 1
    r_idx = empty(problem.batch, n_graphs, grid.n_regions, problem.topk, dtype=torch.int32)
    factor = empty(*r_idx.shape, dtype=torch.float32) if problem.routing_weight == "soft" else None
    fill = empty(sum(widths)) if grid.is_padded else None
    padding = Padding(empty(widths[1]), empty(widths[2])) if kv_grid.is_padded else None
    scale = problem.qk_dim**-0.5
    return (
        RoutedAttention(
            query, key, value, r_idx, grid, kv_grid, problem.num_heads, scale, factor, padding, True
        ),
        qkv,
        fill,
    )


def _lepe(problem: Problem, qkv: Tensor, padding: Tensor | None) -> Lepe | None:
    if not problem.side_dwconv:
        return None
    dim = problem.dim
    weight = qkv.new_empty(dim, 1, problem.side_dwconv, problem.side_dwconv)
    fill = None if padding is None else padding[-dim:]
    return Lepe(qkv[..., -dim:], weight, qkv.new_empty(dim), problem.grid, fill)


def _pooling(problem: Problem, device: torch.device) -> RegionPooling | None:
    if problem.kv_pooling is None:
        return None
    assert problem.kv_per_win is not None
    rows, columns = (torch.empty(problem.kv_per_win, 2, dtype=torch.int32, device=device) for _ in range(2))
    return RegionPooling(rows, columns, problem.kv_pooling, problem.grid)


def _pool(reduction: RegionPooling, kv: Tensor, padding: Tensor | None, problem: Problem) -> None:
    """Keys and values of the regions, and the gradients of what they are made of."""
    grid = problem.grid
    fill = None if padding is None else padding[problem.qk_dim :]
    weight = bias = None
    if reduction.mode == WEIGHTED:
        assert problem.kv_per_win is not None
        sides = (side // problem.kv_per_win for side in (grid.region_height, grid.region_width))
        weight, bias = kv.new_empty(kv.shape[-1], *sides), kv.new_empty(kv.shape[-1])
    pooled, argmax = pooling.pool_forward(kv, fill, reduction, weight, bias)
    pooling.pool_backward(pooled, kv, fill, argmax, reduction, weight, kv)


def _launch(
    kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Launch:
    options = {name: kwargs.pop(name) for name in _COMPILER_OPTIONS if name in kwargs}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constant = {p.name for p in kernel.params if p.is_constexpr or bound[p.name] is None}
    constexprs = {name: bound[name] for name in bound if name in constant}
    signature = {name: _type(value) for name, value in bound.items() if name not in constant}
    # Lists and slices need not start at multiples of 16 bytes.
    divisible = frozenset(name for name, x in _tensors(bound) if _starts_aligned(x))
    name = kernel.fn.__name__.removesuffix("_kernel")
    specimen = KernelSpecimen(name, kernel, signature, constexprs, divisible, **options)
    return Launch(specimen, tuple(grid), bound)


def _tensors(bound: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors among arguments, those of a group named as `maps.query`."""
    for name, value in bound.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple) and name != "CONFIG":
            members: dict[str, Tensor | None] = value._asdict()  # type: ignore[attr-defined]
            yield from ((f"{name}.{inner}", x) for inner, x in members.items() if x is not None)


def _starts_aligned(x: Tensor) -> bool:
    return bool(x.storage_offset() * x.element_size() % 16 == 0)


def _type(value: Any) -> Any:
    """Triton's type of a run-time argument, of a group the group of its members' types."""
    if isinstance(value, tuple):
        return type(value)(*map(_type, value))
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"
