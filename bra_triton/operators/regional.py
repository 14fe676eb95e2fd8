"""Makes the attention to the regions of a given graph differentiable; see `operators.attention`.

| operator | gradient |
|---|---|
| `bra_triton::attend_regional` | for `query`, `key`, `value` |
| `bra_triton::attend_regional_backward` | none |
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend.kernels import fused_kernels
from ..export import is_eager
from ..kernels.grid import RegionGrid
from ..kernels.problem import Padding, RoutedAttention, statistic_dtype
from .library import (
    Witness,
    differentiable,
    fake_of,
    flops_of,
    gradient_operator,
    is_seen,
    needs_gradient,
    operator,
    refusing_batches,
    refusing_second_derivative,
)

_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor r_idx, SymInt[] query_grid, SymInt[] kv_grid, "
    "SymInt num_heads, float scale"
)
_N_TENSORS = 4
_N_NUMBERS = 5


def attend_regional(
    maps: tuple[Tensor, Tensor, Tensor],
    r_idx: Tensor,
    grids: tuple[RegionGrid, RegionGrid],
    num_heads: int,
    scale: float,
    backend: str,
) -> Tensor:
    """Attends to the named regions: `(N, H, W, num_heads * v_head_dim)`; differentiable.

    Tokens past the edge of the maps of keys and values hold zeros and take part in the attention.

    Args:
        maps: queries `(N, H, W, num_heads * qk_head_dim)`, keys `(N, H_kv, W_kv, num_heads * qk_head_dim)`
            and values `(N, H_kv, W_kv, num_heads * v_head_dim)`, of any strides.
        r_idx: `(N, G, P, topk)` int32, contiguous, `G` 1 or `num_heads`.
        grids: regions of the queries, and of keys and values.
        num_heads: attention heads.
        scale: factor of the logits.
        backend: "triton" or "torch".
    """
    arguments = (*maps, r_idx, *(grid.numbers for grid in grids), num_heads, scale, backend)
    if not is_eager() or is_seen(maps):
        out = _attend_by_operator(*arguments)[0]
        return out.clone() if needs_gradient(maps) else out  # as in `operators.attention.attend`
    if needs_gradient(maps):
        return _AttendRegional.apply(*arguments)
    return _forward(*arguments)[0]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem, backend = _problem(*arguments)
    return fused_kernels(backend).attend_routed(problem)


def _backward(grad_out: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, backend = _problem(*arguments)
    gradients = fused_kernels(backend).attend_routed_backward(grad_out.contiguous(), problem, out, lse)
    return gradients.query, gradients.key, gradients.value


class _AttendRegional(torch.autograd.Function):
    """`attend_regional` with a gradient, without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, lse = _forward(*arguments)
        ctx.witness = Witness(out)
        ctx.save_for_backward(out.data, lse, *arguments[:_N_TENSORS])
        ctx.numbers = arguments[_N_TENSORS:]
        return out

    @staticmethod
    @refusing_batches
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        if ctx.witness.sees_change:
            out = _forward(*saved[1:], *ctx.numbers)[0]
        gradients = _backward(grad_out, out, *saved, *ctx.numbers)
        return *refusing_second_derivative(gradients, grad_out, *saved), *(None,) * (1 + _N_NUMBERS)


_operator = operator("attend_regional", f"({_PROBLEM}, str backend) -> (Tensor out, Tensor lse)")(_forward)
_backward_operator = gradient_operator(
    "attend_regional_backward",
    f"(Tensor grad_out, Tensor out, Tensor lse, {_PROBLEM}, str backend) -> (Tensor, Tensor, Tensor)",
)(_backward)


@fake_of(_operator)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (batch, height, width, _), num_heads = query.shape, rest[3]
    lse = query.new_empty(batch, num_heads, height, width, dtype=statistic_dtype(query.dtype))
    return query.new_empty(batch, height, width, value.shape[-1]), lse


@fake_of(_backward_operator)
def _(grad_out: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[:3])


@flops_of(_operator)
def _(*shapes: Any, **_: Any) -> int:
    qk_dim, dim, scores = _counts(*shapes)
    return 2 * scores * (qk_dim + dim)


@flops_of(_backward_operator)
def _(grad_out: Any, out: Any, lse: Any, *shapes: Any, **_: Any) -> int:
    qk_dim, dim, scores = _counts(*shapes)
    return 2 * scores * (3 * qk_dim + 2 * dim)  # as in `operators.attention`


def _counts(query: Any, key: Any, value: Any, r_idx: Any, *numbers: Any) -> tuple[int, int, int]:
    """Channels of the queries and of the values, and the number of scores of one head in all images."""
    query_grid, kv_grid = (RegionGrid(*grid) for grid in numbers[:2])
    queries = query[0] * query_grid.n_regions * query_grid.region_tokens
    return query[-1], value[-1], queries * r_idx[-1] * kv_grid.region_tokens


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[_N_TENSORS:]
    ctx.save_for_backward(*output, *inputs[:_N_TENSORS])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_of_operator(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * (_N_TENSORS + _N_NUMBERS)
    return *_backward_operator(grad_out, *ctx.saved_tensors, *ctx.numbers), *(None,) * (1 + _N_NUMBERS)


_attend_by_operator = differentiable(_operator, _backward_of_operator, _setup_context)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r_idx: Tensor,
    query_grid: Sequence[int],
    kv_grid: Sequence[int],
    num_heads: int,
    scale: float,
    backend: str,
) -> tuple[RoutedAttention[Tensor], str]:
    """The problem that an operator's arguments describe, as backends take it; and the backend's name."""
    query, key, value = (with_dense_tokens(x) for x in (query, key, value))
    grids = RegionGrid(*query_grid), RegionGrid(*kv_grid)
    padding = None
    if grids[1].is_padded:
        padding = Padding(key.new_zeros(key.shape[-1]), value.new_zeros(value.shape[-1]))
    return RoutedAttention(query, key, value, r_idx, *grids, num_heads, scale, padding=padding), backend


def with_dense_tokens(x: Tensor) -> Tensor:
    """An NHWC map that is dense except for its channels, as backends need it: `x` itself, or a copy.

    The stride from token to token must be correct even if the map is one token wide, because kernels compute
    the addresses of rows and images from it, too.
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
