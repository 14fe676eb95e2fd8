"""The operators that PyTorch sees: schema, fake implementation and autograd, for `torch.compile` and friends.

They trust their callers (`functional`): arguments are checked, `qkv` and `r_idx` are contiguous.

| operator | gradient |
|---|---|
| `bra_triton::region_routing` | none: routing is detached here |
| `bra_triton::routed_attention` | for `qkv`, `lepe_weight`, `lepe_bias` |
| `bra_triton::routed_attention_backward` | none |
"""

import torch
from torch import Tensor

from .. import lepe
from ..backend import registry
from ..spec import AttentionSpec


@torch.library.custom_op("bra_triton::region_routing", mutates_args=())
def region_routing(
    qkv: Tensor, qk_dim: int, num_heads: int, n_win: int, topk: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Routes regions; returns `r_weight` (float) and `r_idx` (int32), both `(N, P, topk)`."""
    spec = AttentionSpec(qkv.shape[-1] - 2 * qk_dim, qk_dim, num_heads, n_win, topk, scale)
    with _without_autocast(qkv):
        return registry.load(backend).region_routing(qkv, spec)


@region_routing.register_fake
def _(qkv, qk_dim, num_heads, n_win, topk, scale, backend):
    shape = (qkv.shape[0], n_win**2, topk)
    return qkv.new_empty(shape, dtype=_statistic_dtype(qkv)), qkv.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("bra_triton::routed_attention", mutates_args=())
def routed_attention(
    qkv: Tensor,
    r_idx: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    qk_dim: int,
    num_heads: int,
    n_win: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends to the routed regions and adds LePE.

    Returns:
        The output `(N, H, W, dim)`; the attention's share of it, empty if there is no LePE and the output is
        just that; the backend's softmax statistic `(N, num_heads, P, S)`.
    """
    spec = AttentionSpec(qkv.shape[-1] - 2 * qk_dim, qk_dim, num_heads, n_win, r_idx.shape[-1], scale)
    with _without_autocast(qkv):
        attention, lse = registry.load(backend).attention_forward(qkv, r_idx, spec)
        if lepe_weight is None:
            return attention, attention.new_empty(0), lse
        return (attention + lepe.forward(qkv, lepe_weight, lepe_bias)).contiguous(), attention, lse


@routed_attention.register_fake
def _(qkv, r_idx, lepe_weight, lepe_bias, qk_dim, num_heads, n_win, scale, backend):
    batch, height, width, packed_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, packed_dim - 2 * qk_dim)
    tokens = (height // n_win) * (width // n_win)
    lse = qkv.new_empty(batch, num_heads, n_win**2, tokens, dtype=_statistic_dtype(qkv))
    return out, qkv.new_empty(0) if lepe_weight is None else torch.empty_like(out), lse


@torch.library.custom_op("bra_triton::routed_attention_backward", mutates_args=())
def routed_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    r_idx: Tensor,
    attention: Tensor,
    lse: Tensor,
    lepe_weight: Tensor | None,
    num_heads: int,
    n_win: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the packed projection, `lepe_weight` and `lepe_bias` (empty without LePE)."""
    dim = grad_out.shape[-1]
    spec = AttentionSpec(dim, (qkv.shape[-1] - dim) // 2, num_heads, n_win, r_idx.shape[-1], scale)
    grad_out = grad_out.contiguous()
    with _without_autocast(qkv):
        grad_qkv = registry.load(backend).attention_backward(grad_out, qkv, r_idx, attention, lse, spec)
        if lepe_weight is None:
            return grad_qkv, qkv.new_empty(0), qkv.new_empty(0)
        return grad_qkv, *lepe.backward(grad_out, qkv, lepe_weight, grad_qkv)


@routed_attention_backward.register_fake
def _(grad_out, qkv, r_idx, attention, lse, lepe_weight, num_heads, n_win, scale, backend):
    if lepe_weight is None:
        return torch.empty_like(qkv), qkv.new_empty(0), qkv.new_empty(0)
    return torch.empty_like(qkv), torch.empty_like(lepe_weight), qkv.new_empty(grad_out.shape[-1])


def _save_for_backward(ctx, inputs, output):
    qkv, r_idx, lepe_weight, lepe_bias, _, ctx.num_heads, ctx.n_win, ctx.scale, ctx.backend = inputs
    out, attention, lse = output
    ctx.has_bias = lepe_bias is not None
    ctx.save_for_backward(qkv, r_idx, out if lepe_weight is None else attention, lse, lepe_weight)
    ctx.mark_non_differentiable(attention, lse)
    ctx.set_materialize_grads(False)  # or autograd fills a map with zeros for `attention`


def _backward(ctx, grad_out, _grad_attention, _grad_lse):
    if grad_out is None:
        return (None,) * 9
    qkv, r_idx, attention, lse, lepe_weight = ctx.saved_tensors
    grad_qkv, grad_weight, grad_bias = routed_attention_backward(
        grad_out, qkv, r_idx, attention, lse, lepe_weight, ctx.num_heads, ctx.n_win, ctx.scale, ctx.backend
    )
    lepe_grads = (grad_weight if lepe_weight is not None else None, grad_bias if ctx.has_bias else None)
    return grad_qkv, None, *lepe_grads, None, None, None, None, None


routed_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _without_autocast(qkv: Tensor) -> torch.autocast:
    """Inside an operator the types are decided; autocast would round float32 statistics to half precision."""
    return torch.autocast(qkv.device.type, enabled=False)


def _statistic_dtype(qkv: Tensor) -> torch.dtype:
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32
