"""Plans of a packed attention, forward and backward: routing, lists, attention, LePE."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .arrays import Buffer, channels
from .attention.arguments import ForwardResults, Saved
from .attention.launch import (
    Attention,
    launch_attention,
    launch_finish,
    launch_key_value_gradient,
    launch_query_gradient,
)
from .lepe.arguments import LepeSums
from .lepe.launch import LepeShares, launch_lepe_gradient
from .plan import Kept, Plan, Take
from .problem import Gradients, Needs, PackedAttention, RoutedAttention, Settings
from .routing.arguments import Inverse
from .routing.launch import (
    Routing,
    launch_region_means,
    launch_route,
    launch_route_gradient,
    launch_spread_means,
)
from .routing.lists import (
    ROUTED,
    SMALL_MAP,
    KeyLists,
    form_of,
    launch_key_lists,
    launch_query_lists,
    take_key_lists,
)
from .small_map.arguments import Choices
from .small_map.launch import launch_small_map, launch_small_map_gradient


@dataclass(frozen=True)
class ForwardArrays:
    """What the forward leaves to the backward.

    Attributes:
        attention: `(N, H, W, dim)`: the attention's share of the output; None where that is the output.
        lse: `(N, num_heads, H, W)` float32.
        r_weight: `(N, P, topk)` float32; None where routing weights do not enter.
        r_idx: `(N, P, topk)` int32; None where every region attends to all.
        routed: the attention that remains once regions are chosen.
        form: its form, one of `routing.lists`.
        lists: what the kernels that own queries walk; None for a small map.
    """

    attention: Buffer | None
    lse: Buffer | None
    r_weight: Buffer | None
    r_idx: Buffer | None
    routed: RoutedAttention[Buffer]
    form: str
    lists: KeyLists | None

    @classmethod
    def take(cls, packed: PackedAttention[Buffer], trains: bool, take: Take) -> "ForwardArrays":
        """The arrays that `take` makes, or finds where the forward has kept them."""
        settings, (batch, height, width, _) = packed.settings, packed.qkv.shape
        attention = lse = r_weight = r_idx = None
        if trains and packed.lepe_weight is not None:
            attention = take((batch, height, width, packed.dim), packed.qkv.dtype)
        if trains:
            lse = take((batch, settings.num_heads, height, width), torch.float32)
        choices = (batch, settings.grid.n_regions, settings.topk)
        if packed.weighs:
            r_weight = take(choices, torch.float32)
        if not settings.chooses_all:
            r_idx = take(choices, torch.int32)
        routed = _routed(packed, r_weight, r_idx)
        form = form_of(routed, packed.routing_learns, chooses=True)
        lists = None if form == SMALL_MAP else take_key_lists(routed, form, take)
        return cls(attention, lse, r_weight, r_idx, routed, form, lists)


def kept_bytes(problem: PackedAttention[Tensor]) -> int:
    """Bytes that a forward keeps for its backward."""
    plan = Plan(problem.tensors, problem.qkv.device)
    ForwardArrays.take(_packed(plan, problem.settings), True, plan.keep)
    return plan.kept_bytes


def plan_attend(problem: PackedAttention[Tensor], trains: bool) -> Plan:
    """The forward: of the problem's tensors the attention and, for a backward, what is kept."""
    plan = Plan(problem.tensors, problem.qkv.device)
    packed = _packed(plan, problem.settings)
    out = plan.output((*packed.qkv.shape[:3], packed.dim), packed.qkv.dtype)
    arrays = ForwardArrays.take(packed, trains, plan.keep if trains else plan.scratch)
    results = ForwardResults(out, arrays.attention, arrays.lse)
    routed, lists, settings, listed = arrays.routed, arrays.lists, packed.settings, False
    if arrays.r_idx is not None:
        query, key = _region_queries_keys(plan, packed)
        routing = Routing(query, key, arrays.r_weight, arrays.r_idx, settings.routing_scale)
        if lists is None:
            launch_small_map(plan, routed, routing, packed.lepe(), results, trains)
            return plan
        listed = routed.query_grid == routed.kv_grid
        launch_route(plan, routing, *((*lists.of_choice, settings.grid) if listed else ()))
    assert lists is not None
    if not listed:
        launch_key_lists(plan, routed, lists)
    launch_attention(plan, Attention(routed, arrays.form, lists), packed.lepe(), results)
    return plan


@dataclass(frozen=True)
class _Gradients:
    """Where a backward writes, all outputs of its plan; None where there is nothing to write."""

    qkv: Buffer
    kv: Buffer | None
    means: Buffer | None
    lepe_weight: Buffer | None
    lepe_bias: Buffer | None
    lepe_fill: Buffer | None

    @classmethod
    def output(cls, plan: Plan, packed: PackedAttention[Buffer], needs: Needs) -> "_Gradients":
        def like(x: Buffer | None, needed: bool) -> Buffer | None:
            return plan.output(x.shape, x.dtype) if x is not None and needed else None

        qkv, settings = packed.qkv, packed.settings
        means_shape = (qkv.shape[0], settings.grid.n_regions, 2 * settings.qk_dim)
        has_fill = packed.lepe_weight is not None and packed.padding is not None and needs.padding
        return cls(
            # With keys and values of their own, those of the packed gradient get LePE's share alone.
            plan.output(qkv.shape, qkv.dtype, zeroed=packed.kv is not None),
            like(packed.kv, True),
            plan.output(means_shape, torch.float32) if packed.routing_learns else None,
            like(packed.lepe_weight, needs.lepe_weight),
            like(packed.lepe_bias, needs.lepe_bias),
            plan.output((packed.dim,), torch.float32) if has_fill else None,
        )

    def maps(self, packed: PackedAttention[Buffer]) -> Gradients[Buffer]:
        """The slices of queries, keys and values."""
        qk_dim, last = packed.settings.qk_dim, self.qkv.shape[-1]
        keys_values = channels(self.qkv, qk_dim, last) if self.kv is None else self.kv
        return Gradients(
            channels(self.qkv, 0, qk_dim),
            channels(keys_values, 0, qk_dim),
            channels(keys_values, qk_dim, qk_dim + packed.dim),
        )


def plan_attend_backward(
    problem: PackedAttention[Tensor], saved: tuple[Tensor | None, ...], needs: Needs
) -> Plan:
    """The backward: its inputs are the problem's tensors, the output's gradient, the output, what was kept.

    Its outputs are gradients of `qkv`, `kv`, region means, LePE's weight and bias, and what padding holds by
    LePE; then the shares of padding by the attention. `wanted` tells which of them there are.
    """
    plan = Plan((*problem.tensors, *saved), problem.qkv.device)
    packed = _packed(plan, problem.settings)
    grad_out, out, kept = plan.inputs[len(problem.tensors) :]
    assert grad_out is not None
    assert kept is not None
    arrays = ForwardArrays.take(packed, True, Kept(kept).take)
    attention_out = arrays.attention or out
    assert attention_out is not None
    assert arrays.lse is not None

    gradients = _Gradients.output(plan, packed, needs)
    launch_gradient = _launch_small_map if arrays.lists is None else _launch_by_lists
    needs_padding = arrays.routed.padding is not None and needs.padding
    of_attention = Saved(attention_out, arrays.lse, grad_out)
    padding_shares = launch_gradient(plan, packed, arrays, of_attention, gradients, needs_padding)
    outputs = (gradients.kv, gradients.means, gradients.lepe_weight, gradients.lepe_bias, gradients.lepe_fill)
    plan.wanted = [x is not None for x in (*outputs, padding_shares)]
    return plan


def _launch_small_map(
    plan: Plan,
    packed: PackedAttention[Buffer],
    arrays: ForwardArrays,
    saved: Saved,
    gradients: _Gradients,
    needs_padding: bool,
) -> Buffer | None:
    """Adds the backward of a small map; returns the shares of what padding holds, if asked for."""
    choices = Choices(arrays.r_idx, arrays.r_weight)
    padding_shares = launch_small_map_gradient(
        plan, arrays.routed, choices, saved, gradients.maps(packed), needs_padding
    )
    adds = packed.kv is None
    of_lepe = _launch_lepe_gradient(plan, packed, saved.grad_out, gradients, adds_to_grad=adds)
    launch_finish(plan, None, of_lepe)
    return padding_shares


def _launch_by_lists(
    plan: Plan,
    packed: PackedAttention[Buffer],
    arrays: ForwardArrays,
    saved: Saved,
    gradients: _Gradients,
    needs_padding: bool,
) -> Buffer | None:
    """Adds the backward of the other forms; returns the shares of what padding holds, if asked for."""
    assert arrays.lists is not None
    maps = gradients.maps(packed)
    attention = Attention(arrays.routed, arrays.form, arrays.lists)
    statistics, factor_shares = launch_query_gradient(
        plan, attention, saved, maps.query, packed.routing_learns
    )
    query_lists = launch_query_lists(plan, arrays.routed, arrays.lists)
    # Where rows may be cut, LePE comes first, so that one launch sums its shares and their pieces. Elsewhere
    # it comes last: dK/dV of one region has no register left to add to what is there (sm_90, compiled).
    lepe_first = arrays.form == ROUTED
    of_lepe = _launch_lepe_gradient(plan, packed, saved.grad_out, gradients) if lepe_first else None
    of_keys_values = launch_key_value_gradient(
        plan,
        attention,
        query_lists,
        statistics,
        saved.grad_out,
        maps,
        needs_padding=needs_padding,
        adds_to_value=lepe_first and packed.lepe_weight is not None and packed.kv is None,
    )
    if not lepe_first:
        adds = packed.kv is None
        of_lepe = _launch_lepe_gradient(plan, packed, saved.grad_out, gradients, adds_to_grad=adds)
    launch_finish(plan, of_keys_values, of_lepe)
    if gradients.means is not None:
        assert factor_shares is not None
        assert query_lists.inverse is not None
        _launch_routing_gradient(plan, packed, arrays, factor_shares, query_lists.inverse, gradients)
    return of_keys_values.results.grad_padding


def _launch_lepe_gradient(
    plan: Plan,
    packed: PackedAttention[Buffer],
    grad_out: Buffer,
    gradients: _Gradients,
    adds_to_grad: bool = False,
) -> LepeShares | None:
    lepe = packed.lepe()
    if lepe is None:
        return None
    value = channels(gradients.qkv, 2 * packed.settings.qk_dim, packed.qkv.shape[-1])
    sums = LepeSums(gradients.lepe_weight, gradients.lepe_bias, gradients.lepe_fill)
    return launch_lepe_gradient(plan, grad_out, value, lepe, sums, adds_to_grad)


def _launch_routing_gradient(
    plan: Plan,
    packed: PackedAttention[Buffer],
    arrays: ForwardArrays,
    factor_shares: Buffer,
    inverse: Inverse,
    gradients: _Gradients,
) -> None:
    """Adds what reaches region queries and keys through the routing weights, and from there the map."""
    assert arrays.r_idx is not None
    assert gradients.means is not None
    settings, qk_dim = packed.settings, packed.settings.qk_dim
    query, key = _region_queries_keys(plan, packed)
    launch_route_gradient(
        plan,
        Routing(query, key, arrays.r_weight, arrays.r_idx, settings.routing_scale),
        factor_shares,
        inverse,
        channels(gradients.means, 0, qk_dim),
        channels(gradients.means, qk_dim, 2 * qk_dim),
    )
    if packed.means is None:
        launch_spread_means(plan, gradients.means, gradients.qkv, settings.grid, settings.counts_padding)


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
