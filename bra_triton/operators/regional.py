"""Attention to the regions that a given graph names: schema, fake implementation and autograd for PyTorch.

The operators trust their callers (`regional`): arguments are checked. Maps are NHWC, grids are the numbers of
a `RegionGrid`.

| operator | gradient |
|---|---|
| `bra_triton::regional_attention` | for `query`, `key`, `value` |
| `bra_triton::regional_attention_backward` | none |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import registry
from ..kernels.grid import RegionGrid
from ..kernels.problem import Gradients, Padding, RoutedAttention
from ._shared import gradient_operator, operator, statistic_dtype, without_autocast


@operator
def regional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r_idx: Tensor,
    query_grid: Sequence[int],
    kv_grid: Sequence[int],
    num_heads: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attends to the routed regions; tokens past the edge of `key` and `value` are zeros, and take part.

    Args:
        query: `(N, H, W, num_heads * qk_head_dim)`.
        key: `(N, H_kv, W_kv, num_heads * qk_head_dim)`.
        value: `(N, H_kv, W_kv, num_heads * v_head_dim)`.
        r_idx: `(N, G, P, topk)` int32, `G` 1 or `num_heads`.
        query_grid: regions of `query`.
        kv_grid: regions of `key` and `value`.
        num_heads: attention heads.
        scale: factor of the logits.
        backend: a backend's name.

    Returns:
        The output `(N, H, W, num_heads * v_head_dim)`, contiguous, and the backend's softmax statistic
        `(N, num_heads, H, W)`.
    """
    problem = problem_of(query, key, value, r_idx, query_grid, kv_grid, num_heads, scale)
    with without_autocast(query):
        out, _, lse = registry.load(backend).attention_forward(problem)
    return out, lse


@torch.library.register_fake(regional_attention)
def _(query, key, value, r_idx, query_grid, kv_grid, num_heads, scale, backend):
    batch, height, width, _ = query.shape
    lse = query.new_empty(batch, num_heads, height, width, dtype=statistic_dtype(query))
    return query.new_empty(batch, height, width, value.shape[-1]), lse


@gradient_operator
def regional_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r_idx: Tensor,
    out: Tensor,
    lse: Tensor,
    query_grid: Sequence[int],
    kv_grid: Sequence[int],
    num_heads: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `query`, `key` and `value`, contiguous."""
    problem = problem_of(query, key, value, r_idx, query_grid, kv_grid, num_heads, scale)
    gradients = Gradients(*(x.new_empty(x.shape) for x in (query, key, value)))
    with without_autocast(query):
        registry.load(backend).attention_backward(grad_out.contiguous(), problem, out, lse, gradients)
    return gradients.query, gradients.key, gradients.value


@torch.library.register_fake(regional_attention_backward)
def _(grad_out, query, key, value, *_):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx, inputs, output):
    query, key, value, r_idx, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, r_idx, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _grad_lse):
    if grad_out is None:
        return (None,) * 9
    return *regional_attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * 6


torch.library.register_autograd(regional_attention, _backward, setup_context=_save_for_backward)


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r_idx: Tensor,
    query_grid: Sequence[int],
    kv_grid: Sequence[int],
    num_heads: int,
    scale: float,
) -> RoutedAttention:
    """What a backend takes, of the arguments of `regional_attention`."""
    # A compiler may hand an operator maps in a layout of its own choice.
    query, key, value = (with_dense_tokens(x) for x in (query, key, value))
    grids = RegionGrid(*query_grid), RegionGrid(*kv_grid)
    padding = None
    if grids[1].is_padded:
        padding = Padding(key.new_zeros(key.shape[-1]), value.new_zeros(value.shape[-1]))
    return RoutedAttention(query, key, value, r_idx, *grids, num_heads, scale, padding=padding)


def with_dense_tokens(x: Tensor) -> Tensor:
    """An NHWC map as backends take it, dense but for its channels; a copy only where it is not so already.

    The stride from token to token must be right even in a column of single tokens: kernels need no other.
    """
    _, height, width, channels = x.shape
    batch_stride, row_stride, token_stride, channel_stride = x.stride()
    is_dense = (
        channel_stride == 1
        and token_stride >= channels
        and (height == 1 or row_stride == width * token_stride)
        and (x.shape[0] == 1 or batch_stride == height * width * token_stride)
    )
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)
