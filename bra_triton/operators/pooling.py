"""The operators that down-sample the keys and values inside each region.

The operators do not check their arguments; `modules.downsampling`, which calls them, has done so. Arguments
named `grid` are `RegionGrid.numbers`.

| operator | gradient |
|---|---|
| `bra_triton::pool_regions` | for `qkv`, `fill`, `weight`, `bias` |
| `bra_triton::pool_regions_backward` | none |
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend.kernels import fused_kernels
from ..kernels.arrays import dense
from ..kernels.grid import RegionGrid
from ..kernels.pooling.problem import MAX, RegionPooling
from .library import differentiable, fake_of, flops_of, gradient_operator, operator

_CELLS = "Tensor row_cells, Tensor column_cells"
_NUMBERS = "SymInt qk_dim, SymInt[] grid, str mode, str backend"


@operator(
    "pool_regions",
    f"(Tensor qkv, Tensor? fill, {_CELLS}, Tensor? weight, Tensor? bias, SymInt[] largest, {_NUMBERS}) -> "
    "(Tensor, Tensor)",
)
def pool_regions(
    qkv: Tensor,
    fill: Tensor | None,
    row_cells: Tensor,
    column_cells: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    largest: Sequence[int],
    qk_dim: int,
    grid: Sequence[int],
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Pools keys and values, side by side, inside each region.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`, contiguous.
        fill: `(2*qk_dim + dim,)`: what tokens past the map's edge hold, 0 by default.
        row_cells: `(h', 2)` int32, see `RegionPooling`.
        column_cells: `(w', 2)` int32.
        weight: `(qk_dim + dim, kernel height, kernel width)`, for `WEIGHTED`.
        bias: `(qk_dim + dim,)`, for `WEIGHTED`.
        largest: two numbers, see `RegionPooling`.
        qk_dim: channels of queries and of keys.
        grid: regions of the map.
        mode: see `RegionPooling`.
        backend: "triton" or "torch".

    Returns:
        Keys and values `(N, rows*h', columns*w', qk_dim + dim)`, contiguous; and, for the backward, the
        number of each maximum's token inside its region, int32 of the same shape, empty except for `MAX`.
    """
    high, wide = largest
    pooling = RegionPooling(row_cells, column_cells, mode, RegionGrid(*grid), (high, wide))
    pooled, argmax = fused_kernels(backend).pool(
        qkv[..., qk_dim:], _fill_of(fill, qkv, qk_dim, pooling.grid), pooling, weight, bias
    )
    return pooled, qkv.new_empty(0) if argmax is None else argmax


@fake_of(pool_regions)
def _(
    qkv: Tensor, fill: Tensor | None, row_cells: Tensor, column_cells: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _weight, _bias, _largest, qk_dim, (*_, rows, columns), mode, _backend = rest
    height, width = rows * row_cells.shape[0], columns * column_cells.shape[0]
    shape = (qkv.shape[0], height, width, qkv.shape[-1] - qk_dim)
    argmax = qkv.new_empty(shape, dtype=torch.int32) if mode == MAX else qkv.new_empty(0)
    return qkv.new_empty(shape), argmax


@flops_of(pool_regions)
def _(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _convolution_flops(out_shape[0], shapes[4])


@gradient_operator(
    "pool_regions_backward",
    f"(Tensor grad_pooled, Tensor qkv, Tensor? fill, Tensor argmax, {_CELLS}, Tensor? weight, {_NUMBERS}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def pool_regions_backward(
    grad_pooled: Tensor,
    qkv: Tensor,
    fill: Tensor | None,
    argmax: Tensor,
    row_cells: Tensor,
    column_cells: Tensor,
    weight: Tensor | None,
    qk_dim: int,
    grid: Sequence[int],
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `qkv` (0 for the queries), `fill`, `weight` and `bias`; empty for arguments not given."""
    pooling = RegionPooling(row_cells, column_cells, mode, RegionGrid(*grid))
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_qkv[..., :qk_dim] = 0
    gradients = fused_kernels(backend).pool_backward(
        grad_pooled.contiguous(),
        qkv[..., qk_dim:],
        _fill_of(fill, qkv, qk_dim, pooling.grid),
        argmax if mode == MAX else None,
        pooling,
        weight,
        grad_qkv[..., qk_dim:],
    )
    grad_fill = qkv.new_empty(0)
    if fill is not None:
        grad_fill = torch.zeros_like(fill)
        if gradients.fill is not None:
            grad_fill[qk_dim:] = gradients.fill
    if weight is None:
        return grad_qkv, grad_fill, qkv.new_empty(0), qkv.new_empty(0)
    assert gradients.weight is not None
    assert gradients.bias is not None
    grad_weight = dense(gradients.weight.to(weight.dtype))
    return grad_qkv, grad_fill, grad_weight, gradients.bias.to(weight.dtype)


@fake_of(pool_regions_backward)
def _(
    grad_pooled: Tensor, qkv: Tensor, fill: Tensor | None, argmax: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = rest[2]
    return (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(0) if fill is None else torch.empty_like(fill),
        qkv.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        qkv.new_empty(0) if weight is None else weight.new_empty(weight.shape[0]),
    )


@flops_of(pool_regions_backward)
def _(grad_pooled: Any, *shapes: Any, **_: Any) -> int:
    return 2 * _convolution_flops(grad_pooled, shapes[5])


def _convolution_flops(pooled: Any, weight: Any) -> int:
    """FLOPs of `WEIGHTED`; 0 for the other modes, because PyTorch does not count pooling either."""
    return 0 if weight is None else 2 * math.prod(pooled) * math.prod(weight[1:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, fill, row_cells, column_cells, weight, _, _, ctx.qk_dim, ctx.grid, ctx.mode, ctx.backend = inputs
    _, argmax = output
    ctx.save_for_backward(qkv, fill, argmax, row_cells, column_cells, weight)
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_pooled: Tensor | None, _grad_argmax: None) -> tuple[Tensor | None, ...]:
    if grad_pooled is None:
        return (None,) * 11
    qkv, fill, argmax, row_cells, column_cells, weight = ctx.saved_tensors
    grad_qkv, grad_fill, grad_weight, grad_bias = pool_regions_backward(
        grad_pooled,
        *(qkv, fill, argmax, row_cells, column_cells, weight),
        *(ctx.qk_dim, ctx.grid, ctx.mode, ctx.backend),
    )
    kernel_grads = (None, None) if weight is None else (grad_weight, grad_bias)
    return grad_qkv, None if fill is None else grad_fill, None, None, *kernel_grads, *(None,) * 5


pool = differentiable(pool_regions, _backward, _save_for_backward)


def _fill_of(fill: Tensor | None, qkv: Tensor, qk_dim: int, grid: RegionGrid) -> Tensor | None:
    """The part of `fill` for the keys and values, by default zeros; None if no token is past the edge."""
    if not grid.is_padded:
        return None
    return qkv.new_zeros(qkv.shape[-1] - qk_dim) if fill is None else fill[qk_dim:].contiguous()
