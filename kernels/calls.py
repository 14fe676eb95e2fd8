"""The computations of the Triton backend, each on a cached plan.

What the functions take and return is described in `bra_triton.backend.kernels.FusedKernels`.
"""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .arrays import Buffer, channels
from .attention.arguments import ForwardResults, Saved
from .attention.launch import (
    Attention,
    dot_precision,
    launch_attention,
    launch_key_value_gradient,
    launch_query_gradient,
)
from .grid import RegionGrid
from .lepe.launch import LepeGradients, launch_lepe_gradient
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
    Settings,
)
from .routing.launch import (
    Routing,
    launch_region_means,
    launch_route,
    launch_route_gradient,
    launch_spread_means,
)
from .routing.lists import (
    ROUTED,
    form_of,
    key_list_layout,
    key_lists,
    launch_inverse,
    launch_key_lists,
    launch_query_lists,
)

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
    full_key = (make, *key, dot_precision(torch.float32), tiles.in_force())
    plan = _plans.get(full_key)
    if plan is None:
        plan = make(*arguments)
        with _planning:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            _plans[full_key] = plan
    return plan


def attend(problem: PackedAttention[Tensor], trains: bool, keeps_lists: bool = False) -> AttentionResult:
    """See `FusedKernels`."""
    plan = _plan(_plan_attend, (_key(problem), trains, keeps_lists), problem, trains, keeps_lists)
    outputs = iter(plan.run(*problem.tensors))
    out = next(outputs)
    return AttentionResult(out, *[next(outputs) if wanted else None for wanted in plan.wanted])


def attend_backward(
    grad_out: Tensor, problem: PackedAttention[Tensor], result: AttentionResult, needs: Needs
) -> PackedGradients:
    """See `FusedKernels`."""
    if not grad_out.shape[0]:
        zeros = [
            None if x is None or not needed else torch.zeros_like(x)
            for x, needed in zip(problem.tensors, needs, strict=True)
        ]
        return PackedGradients(torch.zeros_like(problem.qkv), *zeros[1:])
    saved = (grad_out, result.attention, result.lse, result.r_weight, result.r_idx, result.lists)
    key = (_key(problem), needs, result.lists is None)
    plan = _plan(_plan_attend_backward, key, problem, saved, needs)
    outputs = iter(plan.run(*problem.tensors, *saved))
    grad_qkv = next(outputs)
    grad_kv, grad_means, grad_weight, grad_bias, shares, fill = (
        next(outputs) if wanted else None for wanted in plan.wanted
    )
    grad_padding = None
    if problem.padding is not None and needs.padding:
        settings = problem.settings
        of_keys_values = None
        if shares is not None:
            widths = [settings.qk_dim // settings.num_heads, problem.dim // settings.num_heads]
            of_keys, of_values = shares.sum((0, 2, 3)).split(widths, dim=-1)
            of_keys_values = torch.cat((of_keys.flatten(), of_values.flatten()))
        of_means = None
        if grad_means is not None and problem.means is None and settings.counts_padding:
            of_means = share_of_means(grad_means, settings.grid)
        grad_padding = padding_gradient(problem.padding, settings.qk_dim, of_keys_values, fill, of_means)
    return PackedGradients(
        grad_qkv, grad_kv, grad_padding, grad_means if needs.means else None, grad_weight, grad_bias
    )


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


def _plan_attend(problem: PackedAttention[Tensor], trains: bool, keeps_lists: bool) -> Plan:
    plan = Plan(problem.tensors, problem.qkv.device)
    packed = _packed(plan, problem.settings)
    settings, (batch, height, width, _) = packed.settings, packed.qkv.shape
    dtype, map_shape = packed.qkv.dtype, (batch, height, width, packed.dim)
    lepe = packed.lepe()
    out = plan.output(map_shape, dtype)
    attention = plan.output(map_shape, dtype) if trains and lepe is not None else None
    lse = plan.output((batch, settings.num_heads, height, width), torch.float32) if trains else None
    choices = (batch, settings.grid.n_regions, settings.topk)
    r_weight = plan.output(choices, torch.float32) if packed.weighs else None
    r_idx = None if settings.chooses_all else plan.output(choices, torch.int32)
    routed = _routed(packed, r_weight, r_idx)
    form, keeps = form_of(routed, packed.routing_learns), trains and keeps_lists
    lists = key_lists(routed, form, plan.arrays(key_list_layout(routed, form), kept=keeps))
    plan.wanted = [attention is not None, trains, r_weight is not None, r_idx is not None, keeps]

    listed = False
    if r_idx is not None:
        query, key = _region_queries_keys(plan, packed)
        listed = form == ROUTED and routed.query_grid == routed.kv_grid
        launch_route(
            plan,
            Routing(query, key, r_weight, r_idx, settings.routing_scale),
            *((lists.arguments, settings.grid) if listed else ()),
        )
    if not listed:
        launch_key_lists(plan, routed, lists)
    launch_attention(plan, Attention(routed, form, lists), lepe, ForwardResults(out, attention, lse))
    return plan


def _plan_attend_backward(
    problem: PackedAttention[Tensor], saved: tuple[Tensor | None, ...], needs: Needs
) -> Plan:
    plan = Plan((*problem.tensors, *saved), problem.qkv.device)
    n_tensors = len(problem.tensors)
    packed = _packed(plan, problem.settings)
    grad_out, attention_out, lse, r_weight, r_idx, kept = plan.inputs[n_tensors:]
    assert grad_out is not None
    assert attention_out is not None
    assert lse is not None
    settings, qkv, kv = packed.settings, packed.qkv, packed.kv
    qk_dim, dtype = settings.qk_dim, qkv.dtype
    learns = packed.routing_learns

    # With keys and values of their own, those of the packed gradient get LePE's share alone.
    grad_qkv = plan.output(qkv.shape, dtype, zeroed=kv is not None)
    grad_kv = None if kv is None else plan.output(kv.shape, dtype)
    keys_values = channels(grad_qkv, qk_dim, qkv.shape[-1]) if grad_kv is None else grad_kv
    maps = Gradients(
        channels(grad_qkv, 0, qk_dim),
        channels(keys_values, 0, qk_dim),
        channels(keys_values, qk_dim, qk_dim + packed.dim),
    )
    means_shape = (qkv.shape[0], settings.grid.n_regions, 2 * qk_dim)
    grad_means = plan.output(means_shape, torch.float32) if learns else None
    lepe, padded = packed.lepe(), packed.padding is not None and needs.padding
    grad_weight = grad_bias = None
    if packed.lepe_weight is not None and needs.lepe_weight:
        grad_weight = plan.output(packed.lepe_weight.shape, dtype)
    if packed.lepe_bias is not None and needs.lepe_bias:
        grad_bias = plan.output(packed.lepe_bias.shape, dtype)

    routed = _routed(packed, r_weight, r_idx)
    form = form_of(routed, learns)
    layout = key_list_layout(routed, form)
    lists = key_lists(routed, form, plan.arrays(layout) if kept is None else plan.unpack(kept, layout))
    if kept is None:
        launch_key_lists(plan, routed, lists)
    attention = Attention(routed, form, lists)
    statistics, factor_shares = launch_query_gradient(
        plan, attention, Saved(attention_out, lse, grad_out), maps.query, learns
    )
    query_lists = launch_query_lists(plan, routed, lists)
    shares = launch_key_value_gradient(
        plan, attention, query_lists, statistics, grad_out, maps, padded and kv is None
    )
    fill = None
    if lepe is not None:
        fill = plan.output((packed.dim,), torch.float32) if padded else None
        value = channels(grad_qkv, 2 * qk_dim, qkv.shape[-1])
        launch_lepe_gradient(plan, grad_out, value, lepe, LepeGradients(grad_weight, grad_bias, fill))
    if grad_means is not None:
        assert factor_shares is not None
        assert query_lists.inverse is not None
        assert r_idx is not None
        query, key = _region_queries_keys(plan, packed)
        launch_route_gradient(
            plan,
            Routing(query, key, r_weight, r_idx, settings.routing_scale),
            factor_shares,
            query_lists.inverse,
            channels(grad_means, 0, qk_dim),
            channels(grad_means, qk_dim, 2 * qk_dim),
        )
        if packed.means is None:
            launch_spread_means(plan, grad_means, grad_qkv, settings.grid, settings.counts_padding)
    plan.wanted = [x is not None for x in (grad_kv, grad_means, grad_weight, grad_bias, shares, fill)]
    return plan


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


def _packed(plan: Plan, settings: Settings) -> PackedAttention[Buffer]:
    """The problem of the plan's first inputs."""
    qkv, kv, padding, means, lepe_weight, lepe_bias = plan.inputs[:6]
    assert qkv is not None
    return PackedAttention(qkv, kv, padding, means, lepe_weight, lepe_bias, settings)


def _region_queries_keys(plan: Plan, packed: PackedAttention[Buffer]) -> tuple[Buffer, Buffer]:
    """Region queries and keys, those given or the means of the map."""
    settings, means = packed.settings, packed.means
    if means is None:
        shape = (packed.qkv.shape[0], settings.grid.n_regions, 2 * settings.qk_dim)
        means = plan.scratch(shape, torch.float32)
        padding = packed.padding if settings.counts_padding else None
        launch_region_means(plan, packed.qkv, padding, settings.grid, means)
    return channels(means, 0, settings.qk_dim), channels(means, settings.qk_dim, 2 * settings.qk_dim)


def _routed(
    packed: PackedAttention[Buffer], r_weight: Buffer | None, r_idx: Buffer | None
) -> RoutedAttention[Buffer]:
    if r_idx is None:
        return packed.routed(None)
    batch, n_regions, topk = r_idx.shape
    factor = r_weight if packed.settings.routing_weight == "soft" else None
    shape = (batch, 1, n_regions, topk)
    return packed.routed(r_idx.view(*shape), None if factor is None else factor.view(*shape))


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
    lists = key_lists(routed, form, plan.arrays(key_list_layout(routed, form)))
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
