"""Token-to-token attention of a packed projection, with LePE, as PyTorch sees it.

| operator | gradient |
|---|---|
| `bra_triton::routed_attention` | for `qkv`, `kv`, `padding`, `factor`, `lepe_weight`, `lepe_bias` |
| `bra_triton::routed_attention_backward` | none |

The operators trust their callers (`functional`): arguments are checked, `qkv`, `kv` and `r_idx` contiguous
(but not an `r_idx` of all regions, which is not read). `grid` is a `RegionGrid`'s numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import registry
from ..kernels.grid import RegionGrid
from ..kernels.pooling.problem import pooled_grid
from ..kernels.problem import Gradients, Lepe, Padding, RoutedAttention
from ._shared import gradient_operator, operator, or_empty, statistic_dtype, without_autocast

# How the routing weights enter: not at all; as a factor of the chosen keys and values; or straight-through,
# with the forward of "none" and the gradient that such a factor of 1 would get.
ROUTING_WEIGHTS = ("none", "soft", "hard")


@operator
def routed_attention(
    qkv: Tensor,
    kv: Tensor | None,
    padding: Tensor | None,
    r_idx: Tensor,
    factor: Tensor | None,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    qk_dim: int,
    num_heads: int,
    grid: Sequence[int],
    scale: float,
    routing_weight: str,
    keep_attention: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends to the routed regions and adds LePE.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`.
        kv: `(N, H', W', qk_dim + dim)`: keys and values, down-sampled; those of `qkv` by default.
        padding: `(2*qk_dim + dim,)`: what tokens past the map's edge hold, where there are any.
        r_idx: `(N, P, topk)` int32.
        factor: `(N, P, topk)`: the routing weights, unless `routing_weight` is "none".
        lepe_weight: `(dim, 1, k, k)`.
        lepe_bias: `(dim,)`.
        qk_dim: channels of queries and keys.
        num_heads: attention heads.
        grid: regions of the map.
        scale: factor of the logits.
        routing_weight: one of `ROUTING_WEIGHTS`.
        keep_attention: whether a backward will follow.
        backend: a backend's name.

    Returns:
        The output `(N, H, W, dim)`; the attention's share of it for the backward, empty if not kept, or if
        there is no LePE and the output is just that; the backend's softmax statistic `(N, num_heads, H, W)`.
    """
    problem = _problem(qkv, kv, padding, r_idx, factor, qk_dim, num_heads, grid, scale, routing_weight)
    lepe = _lepe(problem, qkv, padding, lepe_weight, lepe_bias)
    with without_autocast(qkv):
        out, attention, lse = registry.load(backend).attention_forward(problem, lepe, keep_attention)
    return out, or_empty(attention, out), lse


@torch.library.register_fake(routed_attention)
def _(
    qkv,
    kv,
    padding,
    r_idx,
    factor,
    lepe_weight,
    lepe_bias,
    qk_dim,
    num_heads,
    grid,
    scale,
    routing_weight,
    keep_attention,
    backend,
):
    batch, height, width, packed_dim = qkv.shape
    out = qkv.new_empty(batch, height, width, packed_dim - 2 * qk_dim)
    lse = qkv.new_empty(batch, num_heads, height, width, dtype=statistic_dtype(qkv))
    keeps = keep_attention and lepe_weight is not None
    return out, torch.empty_like(out) if keeps else out.new_empty(0), lse


@gradient_operator
def routed_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    kv: Tensor | None,
    padding: Tensor | None,
    r_idx: Tensor,
    factor: Tensor | None,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    attention: Tensor,
    lse: Tensor,
    needs_factor: bool,
    needs_lepe: bool,
    qk_dim: int,
    num_heads: int,
    grid: Sequence[int],
    scale: float,
    routing_weight: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tensors that `routed_attention` takes, in its order; empty where there are none."""
    problem = _problem(qkv, kv, padding, r_idx, factor, qk_dim, num_heads, grid, scale, routing_weight)
    lepe = _lepe(problem, qkv, padding, lepe_weight, lepe_bias)
    grad_out = grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    grad_query, grad_key, grad_value = grad_qkv.split(_widths(qkv, qk_dim), dim=-1)
    gradients, grad_kv = Gradients(grad_query, grad_key, grad_value), None
    if kv is not None:
        grad_qkv[..., qk_dim:] = 0
        grad_kv = torch.empty_like(kv)
        gradients = Gradients(grad_query, *grad_kv.split(_widths(qkv, qk_dim)[1:], dim=-1))
    with without_autocast(qkv):
        functions = registry.load(backend)
        small = functions.attention_backward(grad_out, problem, attention, lse, gradients, needs_factor)
        of_lepe = None
        if lepe is not None:
            of_lepe = functions.lepe_backward(grad_out, grad_value, lepe, needs_lepe)
    fill = of_lepe.fill if of_lepe is not None else None
    weight, bias = (of_lepe.weight, of_lepe.bias) if of_lepe is not None and needs_lepe else (None, None)
    return (
        grad_qkv,
        or_empty(grad_kv, qkv),
        or_empty(_packed_padding(padding, small.padding, fill, qk_dim), qkv),
        or_empty(None if small.factor is None else small.factor[:, 0], lse),
        or_empty(None if weight is None else weight.to(qkv.dtype, copy=True), qkv),
        or_empty(None if bias is None else bias.to(qkv.dtype, copy=True), qkv),
    )


@torch.library.register_fake(routed_attention_backward)
def _(
    grad_out,
    qkv,
    kv,
    padding,
    r_idx,
    factor,
    lepe_weight,
    lepe_bias,
    attention,
    lse,
    needs_factor,
    needs_lepe,
    *_,
):
    return (
        torch.empty_like(qkv),
        or_empty(None if kv is None else torch.empty_like(kv), qkv),
        or_empty(None if padding is None else torch.empty_like(padding), qkv),
        lse.new_empty(r_idx.shape if needs_factor else 0),
        or_empty(lepe_weight.new_empty(lepe_weight.shape) if needs_lepe else None, qkv),
        or_empty(lepe_bias.new_empty(lepe_bias.shape) if needs_lepe and lepe_bias is not None else None, qkv),
    )


def _save_for_backward(ctx, inputs, output):
    qkv, kv, padding, r_idx, factor, lepe_weight, lepe_bias, *numbers = inputs
    *ctx.numbers, _, backend = numbers
    ctx.numbers.append(backend)
    out, attention, lse = output
    attention_out = out if lepe_weight is None else attention
    ctx.save_for_backward(qkv, kv, padding, r_idx, factor, lepe_weight, lepe_bias, attention_out, lse)
    ctx.mark_non_differentiable(attention, lse)
    ctx.set_materialize_grads(False)  # or autograd fills a map with zeros for `attention`


def _backward(ctx, grad_out, _grad_attention, _grad_lse):
    n_numbers = len(ctx.numbers) + 1
    if grad_out is None:
        return (None,) * (7 + n_numbers)
    _, _, _, _, needs_factor, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    needs_lepe = needs_weight or needs_bias
    grads = routed_attention_backward(grad_out, *ctx.saved_tensors, needs_factor, needs_lepe, *ctx.numbers)
    _, kv, padding, *_ = ctx.saved_tensors
    grad_qkv, grad_kv, grad_padding, grad_factor, grad_weight, grad_bias = grads
    return (
        grad_qkv,
        None if kv is None else grad_kv,
        None if padding is None else grad_padding,
        None,
        grad_factor if needs_factor else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        *(None,) * n_numbers,
    )


torch.library.register_autograd(routed_attention, _backward, setup_context=_save_for_backward)


def _widths(qkv: Tensor, qk_dim: int) -> list[int]:
    """Channels of queries, keys and values in the packed projection."""
    return [qk_dim, qk_dim, qkv.shape[-1] - 2 * qk_dim]


def _problem(
    qkv: Tensor,
    kv: Tensor | None,
    padding: Tensor | None,
    r_idx: Tensor,
    factor: Tensor | None,
    qk_dim: int,
    num_heads: int,
    grid: Sequence[int],
    scale: float,
    routing_weight: str,
) -> RoutedAttention:
    """What a backend takes, of the arguments of `routed_attention`."""
    query, key, value = qkv.split(_widths(qkv, qk_dim), dim=-1)
    query_grid = kv_grid = RegionGrid(*grid)
    kv_padding = None
    if kv is not None:
        key, value = kv.split(_widths(qkv, qk_dim)[1:], dim=-1)
        cells = (kv.shape[1] // query_grid.rows, kv.shape[2] // query_grid.columns)
        kv_grid = pooled_grid(query_grid, *cells)
    elif padding is not None:
        kv_padding = Padding(*(x.contiguous() for x in padding.split(_widths(qkv, qk_dim))[1:]))
    if routing_weight == "soft":
        assert factor is not None
        factor = factor[:, None].contiguous()
    else:
        factor = None
    problem = RoutedAttention(
        query, key, value, r_idx[:, None], query_grid, kv_grid, num_heads, scale, factor, kv_padding, True
    )
    return problem.merged() if routing_weight == "none" and problem.chooses_all else problem


def _lepe(
    problem: RoutedAttention, qkv: Tensor, padding: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Lepe | None:
    if weight is None:
        return None
    dim = weight.shape[0]
    fill = None if padding is None else padding[-dim:].contiguous()
    return Lepe(qkv[..., -dim:], weight.contiguous(), bias, problem.query_grid, fill)


def _packed_padding(
    padding: Tensor | None, of_attention: Padding | None, of_lepe: Tensor | None, qk_dim: int
) -> Tensor | None:
    """Gradient of the packed row of padding, from the shares of attention and LePE."""
    if padding is None:
        return None
    total = torch.zeros_like(padding, dtype=torch.promote_types(padding.dtype, torch.float32))
    if of_attention is not None:
        total[qk_dim : 2 * qk_dim] += of_attention.key
        total[2 * qk_dim :] += of_attention.value
    if of_lepe is not None:
        total[2 * qk_dim :] += of_lepe
    return total.to(padding.dtype)
