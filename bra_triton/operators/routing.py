"""The operators of routing alone: region means, and the choice of regions.

They serve routers with a layer, which is applied between these two steps, and calls that ask only for the
routing. `operators.attention` does both steps by itself.

| operator | gradient |
|---|---|
| `bra_triton::region_means` | for `qkv`, `padding` |
| `bra_triton::region_means_backward` | none |
| `bra_triton::route` | for `query`, `key` |
| `bra_triton::route_backward` | none |

The operators do not check their arguments; their callers have done so. Arguments named `grid` are
`RegionGrid.numbers`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend.kernels import fused_kernels
from ..kernels.grid import RegionGrid
from ..kernels.padding import region_means_gradient, share_of_means
from ..kernels.problem import statistic_dtype
from .library import differentiable, fake_of, flops_of, gradient_operator, operator


@operator(
    "region_means", "(Tensor qkv, Tensor? padding, SymInt qk_dim, SymInt[] grid, str backend) -> Tensor"
)
def region_means(
    qkv: Tensor, padding: Tensor | None, qk_dim: int, grid: Sequence[int], backend: str
) -> Tensor:
    """Mean query and key of every region: `(N, P, 2*qk_dim)`, float32 or float64.

    `qkv` `(N, H, W, 2*qk_dim + dim)` is contiguous. `padding` `(2*qk_dim + dim,)` is what tokens past the
    map's edge hold; if it is None, these tokens are left out of the means.
    """
    return fused_kernels(backend).region_means(qkv.contiguous(), padding, RegionGrid(*grid), 2 * qk_dim)


@fake_of(region_means)
def _(qkv: Tensor, padding: Tensor | None, qk_dim: int, grid: Sequence[int], backend: str) -> Tensor:
    n_regions = RegionGrid(*grid).n_regions
    return qkv.new_empty(qkv.shape[0], n_regions, 2 * qk_dim, dtype=statistic_dtype(qkv.dtype))


@gradient_operator(
    "region_means_backward", "(Tensor grad, Tensor qkv, Tensor? padding, SymInt[] grid) -> (Tensor, Tensor)"
)
def region_means_backward(
    grad: Tensor, qkv: Tensor, padding: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv` (0 for the values) and of `padding` (empty if it is None)."""
    regions, width = RegionGrid(*grid), grad.shape[-1]
    grad_qkv = qkv.new_zeros(qkv.shape)
    grad_qkv[..., :width] = region_means_gradient(grad, padding is not None, regions)
    if padding is None:
        return grad_qkv, qkv.new_empty(0)
    grad_padding = padding.new_zeros(padding.shape)
    grad_padding[:width] = share_of_means(grad, regions)
    return grad_qkv, grad_padding


@fake_of(region_means_backward)
def _(grad: Tensor, qkv: Tensor, padding: Tensor | None, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    grad_padding = qkv.new_empty(0) if padding is None else torch.empty_like(padding)
    return qkv.new_empty(qkv.shape), grad_padding


def _save_means(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, padding, _, ctx.grid, _ = inputs
    ctx.save_for_backward(qkv, padding)


def _means_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, padding = ctx.saved_tensors
    grad_qkv, grad_padding = region_means_backward(grad, qkv, padding, ctx.grid)
    return grad_qkv, None if padding is None else grad_padding, None, None, None


means_of_regions = differentiable(region_means, _means_backward, _save_means)


@operator("route", "(Tensor query, Tensor key, SymInt topk, float scale, str backend) -> (Tensor, Tensor)")
def route(query: Tensor, key: Tensor, topk: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Chooses regions by the logits of `(N, P, qk_dim)` region queries and keys, float32 or float64.

    Returns `r_weight` (the dtype of `query`) and `r_idx` (int32), both `(N, P, topk)`.
    """
    return fused_kernels(backend).route(*_alike(query, key), topk, scale)


@fake_of(route)
def _(query: Tensor, key: Tensor, topk: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], topk)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int32)


@flops_of(route)
def _(query: Any, key: Any, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(query) * key[1]


@gradient_operator(
    "route_backward",
    "(Tensor grad_weight, Tensor r_weight, Tensor r_idx, Tensor query, Tensor key, float scale, str backend)"
    " -> (Tensor, Tensor)",
)
def route_backward(
    grad_weight: Tensor,
    r_weight: Tensor,
    r_idx: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `query` and `key`, contiguous."""
    return fused_kernels(backend).route_backward(
        grad_weight.contiguous(), r_weight, r_idx, *_alike(query, key), scale
    )


@fake_of(route_backward)
def _(
    grad_weight: Tensor, r_weight: Tensor, r_idx: Tensor, query: Tensor, key: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@flops_of(route_backward)
def _(grad_weight: Any, r_weight: Any, r_idx: Any, query: Any, key: Any, *rest: Any, **_: Any) -> int:
    return 4 * math.prod(query) * key[1]


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, _, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*output, query, key)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, grad_weight: Tensor | None, _grad_idx: None) -> tuple[Tensor | None, ...]:
    if grad_weight is None:
        return (None,) * 5
    return *route_backward(grad_weight, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


choose_regions = differentiable(route, _route_backward, _save_route)


def _alike(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """`query` and `key` with equal strides, dense except for their channels; copies unless they have these.

    Slices of one tensor of means have such strides.
    """
    row = query.stride(1)
    if (
        query.stride() == key.stride()
        and query.stride(2) == 1
        and query.stride(0) == query.shape[1] * row
        and query.numel()
    ):
        return query, key
    return query.contiguous(), key.contiguous()
