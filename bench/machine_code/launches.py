"""What the package would launch on a GPU, recorded without one, ready to be compiled.

The launches themselves run, on tensors without data, and only the last step is replaced: where a kernel would
start, its arguments are noted. So tiles, warps and types are those of a real launch, not a second list.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import JITFunction

from bra_triton.bench.machine_code.static_analysis import KernelSpecimen
from bra_triton.kernels.attention import launch as attention
from bra_triton.kernels.grid import RegionGrid
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
class Setting:
    """Sizes and mode of one attention over packed projections, enough to launch it.

    Attributes:
        batch: images.
        height: tokens in a column of the map; a side that is no multiple of `n_win` is padded.
        width: tokens in a row of the map.
        n_win: regions a side.
        topk: regions that every region attends to.
        num_heads: attention heads.
        qk_head_dim: channels of a query or key in one head.
        v_head_dim: channels of a value in one head.
        kv_per_win: keys a side of a region; None for as many as queries.
        kv_pooling: one of `pooling.problem.MODES` that makes `kv_per_win` keys of a region's; None for keys
            that come as they are.
        routing_weight: "none", "soft" or "hard".
        head_graphs: a graph for every head.
        side_dwconv: side of LePE's convolution, 0 for none.
    """

    batch: int
    height: int
    width: int
    n_win: int
    topk: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_per_win: int | None = None
    kv_pooling: str | None = None
    routing_weight: str = "none"
    head_graphs: bool = False
    side_dwconv: int = 3

    @property
    def qk_dim(self) -> int:
        """Channels of the queries, all heads together."""
        return self.num_heads * self.qk_head_dim

    @property
    def dim(self) -> int:
        """Channels of the values, all heads together."""
        return self.num_heads * self.v_head_dim

    @property
    def chooses_all(self) -> bool:
        """Whether regions make no difference, and launches merge them."""
        return self.routing_weight == "none" and not self.head_graphs and self.topk == self.n_win**2

    @property
    def grid(self) -> RegionGrid:
        """Regions of the queries."""
        return RegionGrid.of_windows(self.height, self.width, self.n_win)

    @property
    def kv_grid(self) -> RegionGrid:
        """Regions of the keys."""
        if self.kv_per_win is None:
            return self.grid
        side = self.n_win * self.kv_per_win
        return RegionGrid.of_windows(side, side, self.n_win)


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


def record_attention(setting: Setting, dtype: torch.dtype) -> list[Launch]:
    """Every launch of one forward and backward of an attention, routing and pooling included.

    Raises:
        TypeError: under `TRITON_INTERPRET=1`, where kernels are not compiled.
    """
    problem, qkv, padding = _problem(setting, dtype)
    gradients = Gradients(*torch.empty_like(qkv).split(_widths(setting), dim=-1))
    if problem.key.shape[1:3] != problem.query.shape[1:3]:
        kv = torch.cat([problem.key, problem.value], -1)
        gradients = Gradients(gradients.query, *kv.split(_widths(setting)[1:], dim=-1))
    needs_factor = setting.routing_weight != "none"
    problem = problem.merged() if setting.chooses_all else problem
    lepe = _lepe(setting, qkv, padding)
    reduction = _pooling(setting, qkv.device)

    def run() -> None:
        if reduction is not None:
            _pool(reduction, qkv[..., setting.qk_dim :], padding, setting)
        if not setting.chooses_all:
            means = routing.region_means(qkv, padding, setting.grid, 2 * setting.qk_dim)
            query, key = means.split(setting.qk_dim, dim=-1)
            r_weight, r_idx = routing.route(query, key, setting.topk, problem.scale)
        out, _, lse = attention.attention_forward(problem, lepe)
        attention.attention_backward(torch.empty_like(out), problem, out, lse, gradients, needs_factor)
        if lepe is not None:
            lepe_launches.lepe_backward(out, gradients.value, lepe)
        if needs_factor:
            routing.route_backward(r_weight, r_weight, r_idx, query, key, problem.scale)

    return record(run)


def _widths(setting: Setting) -> list[int]:
    return [setting.qk_dim, setting.qk_dim, setting.dim]


def _problem(setting: Setting, dtype: torch.dtype) -> tuple[RoutedAttention, Tensor, Tensor | None]:
    """The attention on tensors without data, its packed projection and the projection of padding."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    grid, kv_grid, widths = setting.grid, setting.kv_grid, _widths(setting)
    qkv = empty(setting.batch, setting.height, setting.width, sum(widths))
    query, key, value = qkv.split(widths, dim=-1)
    if kv_grid is not grid and setting.kv_per_win is not None:
        key, value = empty(setting.batch, kv_grid.height, kv_grid.width, sum(widths[1:])).split(
            widths[1:], -1
        )
    n_graphs = setting.num_heads if setting.head_graphs else 1
    r_idx = empty(setting.batch, n_graphs, grid.n_regions, setting.topk, dtype=torch.int32)
    factor = empty(*r_idx.shape, dtype=torch.float32) if setting.routing_weight == "soft" else None
    fill = empty(sum(widths)) if grid.is_padded else None
    padding = Padding(empty(widths[1]), empty(widths[2])) if kv_grid.is_padded else None
    scale = setting.qk_dim**-0.5
    return (
        RoutedAttention(
            query, key, value, r_idx, grid, kv_grid, setting.num_heads, scale, factor, padding, True
        ),
        qkv,
        fill,
    )


def _lepe(setting: Setting, qkv: Tensor, padding: Tensor | None) -> Lepe | None:
    if not setting.side_dwconv:
        return None
    dim = setting.dim
    weight = qkv.new_empty(dim, 1, setting.side_dwconv, setting.side_dwconv)
    fill = None if padding is None else padding[-dim:]
    return Lepe(qkv[..., -dim:], weight, qkv.new_empty(dim), setting.grid, fill)


def _pooling(setting: Setting, device: torch.device) -> RegionPooling | None:
    if setting.kv_pooling is None:
        return None
    assert setting.kv_per_win is not None
    rows, columns = (torch.empty(setting.kv_per_win, 2, dtype=torch.int32, device=device) for _ in range(2))
    return RegionPooling(rows, columns, setting.kv_pooling, setting.grid)


def _pool(reduction: RegionPooling, kv: Tensor, padding: Tensor | None, setting: Setting) -> None:
    """Keys and values of the regions, and the gradients of what they are made of."""
    grid = setting.grid
    fill = None if padding is None else padding[setting.qk_dim :]
    weight = bias = None
    if reduction.mode == WEIGHTED:
        assert setting.kv_per_win is not None
        sides = (side // setting.kv_per_win for side in (grid.region_height, grid.region_width))
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
        elif hasattr(value, "_asdict") and name != "CONFIG":
            yield from ((f"{name}.{inner}", x) for inner, x in value._asdict().items() if x is not None)


def _starts_aligned(x: Tensor) -> bool:
    return bool(x.storage_offset() * x.element_size() % 16 == 0)


def _type(value: Any) -> Any:
    """Triton's type of a run-time argument, of a group the group of its members' types."""
    if isinstance(value, tuple):
        return type(value)(*map(_type, value))
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"
