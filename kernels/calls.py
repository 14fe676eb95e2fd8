"""The computations of the Triton backend, each on a cached plan.

What the functions take and return is described in `bra_triton.backend.kernels.FusedKernels`.
"""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .arrays import Buffer
from .attention.arguments import ForwardResults, Saved
from .attention.launch import (
    Attention,
    float32_setting,
    launch_attention,
    launch_key_value_gradient,
    launch_query_gradient,
)
from .grid import RegionGrid
from .packed import plan_attend, plan_attend_backward
from .padding import padding_gradient, share_of_means
from .plan import Plan
from .pooling.launch import pool, pool_backward
from .problem import (
    AttentionResult,
    Gradients,
    Needs,
    PackedAttention,
    PackedGradients,
    Padding,
    RoutedAttention,
)
from .routing.launch import Routing, launch_region_means, launch_route, launch_route_gradient
from .routing.lists import form_of, launch_inverse, launch_key_lists, launch_query_lists, take_key_lists

__all__ = [
    "attend",
    "attend_backward",
    "attend_routed",
    "attend_routed_backward",
    "pool",
    "pool_backward",
    "region_means",
    "route",
    "route_backward",
]

# Plans of a training run: a forward and a backward for every size of map and every module's numbers.
_MOST_PLANS = 1024
_plans: dict[Hashable, Plan] = {}
_planning = Lock()


def forget_plans() -> None:
    """Plans every call anew: for whoever has changed the tables of tiles."""
    _plans.clear()


def _plan(make: Callable[..., Plan], key: tuple[Hashable, ...], *arguments: Any) -> Plan:
    """The plan that `make` makes of the arguments, made once for a key.

    Args:
        make: makes the plan.
        key: all that the plan depends on, except PyTorch's setting of float32 products and the tiles in
            force.
        arguments: of `make`.
    """
    full_key = (make, *key, float32_setting(), tiles.in_force())
    plan = _plans.get(full_key)
    if plan is None:
        plan = make(*arguments)
        with _planning:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            _plans[full_key] = plan
    return plan


def attend(problem: PackedAttention[Tensor], trains: bool, own_form: bool = False) -> AttentionResult:
    """See `FusedKernels`."""
    plan = _plan(plan_attend, (_key(problem), trains, own_form), problem, trains, own_form)
    out, *rest = plan.run(*problem.tensors)
    if own_form:
        return AttentionResult(out, kept=rest[0] if rest else None)
    outputs = iter(rest)
    return AttentionResult(out, *[next(outputs) if wanted else None for wanted in plan.wanted])


def attend_backward(
    grad_out: Tensor, problem: PackedAttention[Tensor], result: AttentionResult, needs: Needs
) -> PackedGradients:
    """See `FusedKernels`."""
    saved = (grad_out, *result[1:])
    key = (_key(problem), needs, result.kept is None)
    plan = _plan(plan_attend_backward, key, problem, saved, needs)
    grad_qkv, *rest = plan.run(*problem.tensors, *saved)
    outputs = iter(rest)
    grad_kv, grad_means, grad_weight, grad_bias, fill, shares = (
        next(outputs) if wanted else None for wanted in plan.wanted
    )
    grad_padding = None
    if problem.padding is not None and needs.padding:
        grad_padding = _padding_gradient(problem, shares, fill, grad_means)
    return PackedGradients(
        grad_qkv, grad_kv, grad_padding, grad_means if needs.means else None, grad_weight, grad_bias
    )


def _padding_gradient(
    problem: PackedAttention[Tensor], shares: Tensor | None, fill: Tensor | None, grad_means: Tensor | None
) -> Tensor:
    settings = problem.settings
    assert problem.padding is not None
    of_keys_values = of_means = None
    if shares is not None:
        widths = [settings.qk_dim // settings.num_heads, problem.dim // settings.num_heads]
        of_keys, of_values = shares.sum((0, 2, 3)).split(widths, dim=-1)
        of_keys_values = torch.cat((of_keys.flatten(), of_values.flatten()))
    if grad_means is not None and problem.means is None and settings.counts_padding:
        of_means = share_of_means(grad_means, settings.grid)
    return padding_gradient(problem.padding, settings.qk_dim, of_keys_values, fill, of_means)


def attend_routed(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`; the statistic is the softmax denominator's base-2 logarithm."""
    tensors = _tensors(problem)
    out, lse = _plan(_plan_attend_routed, _routed_key(problem), problem).run(*tensors)
    return out, lse


def attend_routed_backward(
    grad_out: Tensor, problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor
) -> Gradients[Tensor]:
    """See `FusedKernels`."""
    plan = _plan(_plan_attend_routed_backward, _routed_key(problem), problem, (grad_out, out, lse))
    return Gradients(*plan.run(*_tensors(problem), grad_out, out, lse))


def region_means(qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
    """See `FusedKernels`."""

    def make() -> Plan:
        plan = Plan((qkv, padding), qkv.device)
        means = plan.output((qkv.shape[0], grid.n_regions, channels), torch.float32)
        launch_region_means(plan, plan.given[0], plan.inputs[1], grid, means)
        return plan

    return make().run(qkv, padding)[0]


def route(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`."""
    plan = Plan((query, key), query.device)
    shape = (*query.shape[:2], topk)
    r_weight, r_idx = plan.output(shape, torch.float32), plan.output(shape, torch.int32)
    region_query, region_key = plan.given
    launch_route(plan, Routing(region_query, region_key, r_weight, r_idx, scale))
    outputs = plan.run(query, key)
    return outputs[0], outputs[1]


def route_backward(
    grad_weight: Tensor, r_weight: Tensor, r_idx: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`."""
    tensors = (grad_weight, r_weight, r_idx, query, key)
    plan = Plan(tensors, query.device)
    of_weight, weight, idx, region_query, region_key = plan.given
    batch, n_regions, topk = idx.shape
    grads = [plan.output(tuple(query.shape), torch.float32) for _ in range(2)]
    inverse = launch_inverse(plan, idx.view(batch, 1, n_regions, topk), n_regions)
    shares = of_weight.view(batch, 1, n_regions, 1, topk)
    launch_route_gradient(
        plan, Routing(region_query, region_key, weight, idx, scale), shares, inverse, *grads
    )
    outputs = plan.run(*tensors)
    return outputs[0], outputs[1]


def _plan_attend_routed(problem: RoutedAttention[Tensor]) -> Plan:
    plan, routed = _routed_plan(problem, ())
    (batch, height, width, _), num_heads = routed.query.shape, routed.num_heads
    out = plan.output((batch, height, width, routed.value.shape[-1]), routed.query.dtype)
    lse = plan.output((batch, num_heads, height, width), torch.float32)
    attention = _listed(plan, routed)
    launch_attention(plan, attention, None, ForwardResults(out, None, lse))
    return plan


def _plan_attend_routed_backward(
    problem: RoutedAttention[Tensor], saved: tuple[Tensor, Tensor, Tensor]
) -> Plan:
    plan, routed = _routed_plan(problem, saved)
    grad_out, out, lse = plan.given[-3:]
    gradients = Gradients(*(plan.output(x.shape, x.dtype) for x in (routed.query, routed.key, routed.value)))
    attention = _listed(plan, routed)
    statistics, _ = launch_query_gradient(plan, attention, Saved(out, lse, grad_out), gradients.query)
    query_lists = launch_query_lists(plan, routed, attention.lists)
    launch_key_value_gradient(plan, attention, query_lists, statistics, grad_out, gradients, False)
    return plan


def _routed_plan(
    problem: RoutedAttention[Tensor], saved: tuple[Tensor, ...]
) -> tuple[Plan, RoutedAttention[Buffer]]:
    """A plan whose inputs are the tensors of a problem and others, and the problem of its buffers."""
    plan = Plan((*_tensors(problem), *saved), problem.query.device)
    query, key, value, r_idx, padding_key, padding_value = plan.inputs[:6]
    assert query is not None
    assert key is not None
    assert value is not None
    padding = None
    if padding_key is not None and padding_value is not None:
        padding = Padding(padding_key, padding_value)
    grids = problem.query_grid, problem.kv_grid
    return plan, RoutedAttention(
        query, key, value, r_idx, *grids, problem.num_heads, problem.scale, padding=padding
    )


def _listed(plan: Plan, routed: RoutedAttention[Buffer]) -> Attention:
    """The attention with lists that are written for it."""
    form = form_of(routed)
    lists = take_key_lists(routed, form, plan.scratch)
    launch_key_lists(plan, routed, lists)
    return Attention(routed, form, lists)


def _tensors(problem: RoutedAttention[Tensor]) -> tuple[Tensor | None, ...]:
    padding = (None, None) if problem.padding is None else (problem.padding.key, problem.padding.value)
    return problem.query, problem.key, problem.value, problem.r_idx, *padding


def _routed_key(problem: RoutedAttention[Tensor]) -> tuple[Hashable, ...]:
    """What a plan depends on: all but the values."""
    return (
        problem.query_grid,
        problem.kv_grid,
        problem.num_heads,
        problem.scale,
        *((None if x is None else (x.shape, x.stride(), x.dtype, x.device)) for x in _tensors(problem)),
    )


def _key(problem: PackedAttention[Tensor]) -> tuple[Hashable, ...]:
    """What a plan depends on: all but the values. The tensors are contiguous, and of one dtype."""
    qkv, kv = problem.qkv, problem.kv
    return (
        problem.settings,
        qkv.shape,
        qkv.dtype,
        qkv.device,
        None if kv is None else kv.shape,
        problem.padding is None,
        problem.means is None,
        None if problem.lepe_weight is None else problem.lepe_weight.shape,
        problem.lepe_bias is None,
    )
