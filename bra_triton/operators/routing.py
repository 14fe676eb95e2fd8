"""Routing as PyTorch sees it: region means, then the choice of regions.

| operator | gradient |
|---|---|
| `bra_triton::region_means` | for `qkv`, `padding` |
| `bra_triton::region_means_backward` | none |
| `bra_triton::route` | for `query`, `key` |
| `bra_triton::route_backward` | none |

The operators trust their callers (`functional`, `nchw_attention`): arguments are checked. `grid` is a
`RegionGrid`'s numbers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import registry
from ..backend.region_layout import counted_tokens, tokens_inside
from ..kernels.grid import RegionGrid
from ._shared import gradient_operator, operator, or_empty, statistic_dtype, without_autocast


@operator
def region_means(
    qkv: Tensor, padding: Tensor | None, qk_dim: int, grid: Sequence[int], backend: str
) -> Tensor:
    """Mean query and key of every region: `(N, P, 2*qk_dim)`, float32 or float64.

    `qkv` `(N, H, W, 2*qk_dim + dim)` is contiguous; `padding` `(2*qk_dim + dim,)` is what tokens past the
    map's edge hold. Without it they are left out of the means.
    """
    with without_autocast(qkv):
        return registry.load(backend).region_means(qkv, padding, RegionGrid(*grid), 2 * qk_dim)


@torch.library.register_fake(region_means)
def _(qkv, padding, qk_dim, grid, backend):
    n_regions = RegionGrid(*grid).n_regions
    return qkv.new_empty(qkv.shape[0], n_regions, 2 * qk_dim, dtype=statistic_dtype(qkv))


@gradient_operator
def region_means_backward(
    grad: Tensor, qkv: Tensor, padding: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of the packed projection (zero in the values) and of the padding (empty without it)."""
    regions, of_values = RegionGrid(*grid), qkv.shape[-1] - grad.shape[-1]
    per_token = grad / counted_tokens(regions, padding, grad.device)
    per_token = per_token.unflatten(1, (regions.rows, regions.columns))
    rows = per_token.repeat_interleave(regions.region_height, dim=1)[:, : regions.height]
    tokens = rows.to(qkv.dtype).repeat_interleave(regions.region_width, dim=2)[:, :, : regions.width]
    grad_qkv = F.pad(tokens, (0, of_values))
    if padding is None:
        return grad_qkv, or_empty(None, qkv)
    n_padded = regions.region_tokens - tokens_inside(regions, grad.device)
    of_padding = (per_token * n_padded[..., None]).sum(dim=(0, 1, 2))
    return grad_qkv, F.pad(of_padding, (0, of_values)).to(padding.dtype)


@torch.library.register_fake(region_means_backward)
def _(grad, qkv, padding, grid):
    return torch.empty_like(qkv), or_empty(None if padding is None else torch.empty_like(padding), qkv)


def _save_means(ctx, inputs, output):
    qkv, padding, _, ctx.grid, _ = inputs
    ctx.save_for_backward(qkv, padding)


def _means_backward(ctx, grad):
    qkv, padding = ctx.saved_tensors
    grad_qkv, grad_padding = region_means_backward(grad, qkv, padding, ctx.grid)
    return grad_qkv, None if padding is None else grad_padding, None, None, None


torch.library.register_autograd(region_means, _means_backward, setup_context=_save_means)


@operator
def route(query: Tensor, key: Tensor, topk: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Chooses regions by the logits of `(N, P, qk_dim)` region queries and keys, float32 or float64.

    Returns `r_weight` (the dtype of `query`) and `r_idx` (int32), both `(N, P, topk)`.
    """
    with without_autocast(query):
        return registry.load(backend).route(*_alike(query, key), topk, scale)


@torch.library.register_fake(route)
def _(query, key, topk, scale, backend):
    shape = (*query.shape[:2], topk)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int32)


@gradient_operator
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
    with without_autocast(query):
        return registry.load(backend).route_backward(grad_weight, r_weight, r_idx, *_alike(query, key), scale)


@torch.library.register_fake(route_backward)
def _(grad_weight, r_weight, r_idx, query, key, scale, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save_route(ctx, inputs, output):
    query, key, _, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*output, query, key)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _route_backward(ctx, grad_weight, _grad_idx):
    if grad_weight is None:
        return (None,) * 5
    return *route_backward(grad_weight, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


torch.library.register_autograd(route, _route_backward, setup_context=_save_route)


def _alike(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides, dense but for their channels, as slices of one tensor of means are."""
    row = query.stride(1)
    if (
        query.stride() == key.stride()
        and query.stride(2) == 1
        and query.stride(0) == query.shape[1] * row
        and query.numel()
    ):
        return query, key
    return query.contiguous(), key.contiguous()
