"""Routing, attention and LePE of a packed projection on the torch backend, forward and backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.padding import padding_gradient, region_means_gradient
from ...kernels.problem import (
    Gradients,
    Needs,
    PackedAttention,
    PackedGradients,
    statistic_dtype,
)
from .attention import attend_routed, attention_backward
from .autocast import outside_autocast
from .lepe import lepe_backward, lepe_forward
from .routing import choose, region_means, route_backward


class _Saved(NamedTuple):
    """The tensors that the backward reads. `attend` returns them in this order, without those that are None.

    `attention` `(N, H, W, dim)` is the output before LePE is added; without LePE it is the output itself,
    which `attend` does not return again. `lse` is `(N, num_heads, H, W)`. `r_weight` and `r_idx` are
    `(N, P, topk)`; the first is None if routing weights are not used, the second if all regions are chosen.
    """

    attention: Tensor | None
    lse: Tensor
    r_weight: Tensor | None
    r_idx: Tensor | None

    @classmethod
    def of(cls, problem: PackedAttention[Tensor], out: Tensor | None, saved: Sequence[Tensor]) -> "_Saved":
        rest = iter(saved)
        attention = out if problem.lepe_weight is None else next(rest)
        lse = next(rest)
        r_weight = next(rest) if problem.weighs else None
        return cls(attention, lse, r_weight, None if problem.settings.chooses_all else next(rest))


@torch.no_grad()  # the operator has no autograd formula, so PyTorch would record every step inside it
@outside_autocast
def attend(problem: PackedAttention[Tensor], trains: bool) -> tuple[Tensor, list[Tensor]]:
    """See `FusedKernels`."""
    settings, r_weight, r_idx = problem.settings, None, None
    if not settings.chooses_all:
        query, key = _means(problem).split_with_sizes([settings.qk_dim] * 2, -1)
        r_weight, r_idx = choose(query, key, settings.topk, settings.routing_scale, problem.weighs)
    out, lse = attend_routed(problem.routed(r_idx, r_weight))
    lepe, attention = problem.lepe(), None
    if lepe is not None:
        attention, out = out, lepe_forward(out, lepe)
    saved = (attention, lse, r_weight if problem.weighs else None, r_idx)
    return out, [x for x in saved if x is not None] if trains else []


def saved_like(problem: PackedAttention[Tensor]) -> list[Tensor]:
    """See `FusedKernels`."""
    qkv, settings = problem.qkv, problem.settings
    batch, height, width, _ = qkv.shape
    dtype, choices = statistic_dtype(qkv.dtype), (batch, settings.grid.n_regions, settings.topk)
    tensors = [qkv.new_empty(batch, settings.num_heads, height, width, dtype=dtype)]
    if problem.lepe_weight is not None:
        tensors.insert(0, qkv.new_empty(batch, height, width, problem.dim))
    if problem.weighs:
        tensors.append(qkv.new_empty(choices, dtype=dtype))
    if not settings.chooses_all:
        tensors.append(qkv.new_empty(choices, dtype=torch.int32))
    return tensors


@torch.no_grad()  # create_graph=True runs a backward with gradients enabled
@outside_autocast
def attend_backward(
    grad_out: Tensor,
    problem: PackedAttention[Tensor],
    out: Tensor | None,
    saved: Sequence[Tensor],
    needs: Needs,
) -> PackedGradients:
    """See `FusedKernels`."""
    result = _Saved.of(problem, out, saved)
    assert result.attention is not None
    settings, qkv, kv = problem.settings, problem.qkv, problem.kv
    qk_dim = settings.qk_dim
    widths = [qk_dim, qk_dim, problem.dim]
    grad_qkv = qkv.new_empty(qkv.shape)
    maps, grad_kv = Gradients(*grad_qkv.split_with_sizes(widths, -1)), None
    if kv is not None:
        grad_qkv[..., qk_dim:] = 0
        grad_kv = kv.new_empty(kv.shape)
        maps = Gradients(maps.query, *grad_kv.split(widths[1:], dim=-1))
    routed = problem.routed(result.r_idx, result.r_weight)
    small = attention_backward(
        grad_out, routed, result.attention, result.lse, maps, needs_factor=problem.routing_learns
    )
    lepe, of_lepe = problem.lepe(), None
    if lepe is not None:
        needs_lepe = needs.lepe_weight or needs.lepe_bias
        of_lepe = lepe_backward(grad_out, grad_qkv[..., 2 * qk_dim :], lepe, needs_lepe)
    grad_means = None
    if problem.routing_learns:
        assert small.factor is not None
        grad_means = _route_gradient(small.factor[:, 0], problem, result)
    if grad_means is not None and problem.means is None:
        grad_qkv[..., : 2 * qk_dim] += region_means_gradient(
            grad_means, settings.counts_padding, settings.grid
        )
    grad_padding = None
    if problem.padding is not None and needs.padding:
        of_keys_values = None if small.padding is None else (small.padding.key, small.padding.value)
        of_lepe_fill = None if of_lepe is None else of_lepe.fill
        grad_padding = padding_gradient(problem, of_keys_values, of_lepe_fill, grad_means)
    return PackedGradients(
        grad_qkv,
        grad_kv if needs.kv else None,
        grad_padding,
        grad_means if needs.means else None,
        _cast(of_lepe.weight if of_lepe and needs.lepe_weight else None, qkv),
        _cast(of_lepe.bias if of_lepe and needs.lepe_bias else None, qkv),
    )


def _means(problem: PackedAttention[Tensor]) -> Tensor:
    if problem.means is not None:
        return problem.means
    settings = problem.settings
    padding = problem.padding if settings.counts_padding else None
    return region_means(problem.qkv, padding, settings.grid, 2 * settings.qk_dim)


def _route_gradient(grad_weight: Tensor, problem: PackedAttention[Tensor], result: _Saved) -> Tensor:
    """Gradient of the region queries and keys, `(N, P, 2*qk_dim)`."""
    assert result.r_weight is not None
    assert result.r_idx is not None
    query, key = _means(problem).split(problem.settings.qk_dim, dim=-1)
    scale = problem.settings.routing_scale
    return torch.cat(route_backward(grad_weight, result.r_weight, result.r_idx, query, key, scale), dim=-1)


def _cast(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else dense(x.to(like.dtype))
