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
from .forms import ROUTED, SMALL_MAP, form_of
from .lepe.arguments import LepeSums
from .lepe.launch import LepeShares, launch_lepe_gradient
from .plan import Kept, Plan, Take
from .problem import Gradients, Needs, PackedAttention, RoutedAttention
from .routing.arguments import Inverse
from .routing.launch import (
    Routing,
    launch_region_means,
    launch_route,
    launch_route_gradient,
    launch_spread_means,
)
from .routing.lists import KeyLists, launch_key_lists, launch_query_lists, take_key_lists
from .small_map.arguments import Choices
from .small_map.launch import launch_small_map, launch_small_map_gradient


@dataclass(frozen=True)
class ForwardArrays:
    """The arrays that the forward writes besides its output, and that the backward reads.

    Attributes:
        attention: `(N, H, W, dim)`: the attention's output without LePE; None without LePE, where the output
            itself serves, and if no backward follows.
        lse: `(N, num_heads, H, W)` float32; None if no backward follows.
        r_weight: `(N, P, topk)` float32; None if routing weights are not used.
        r_idx: `(N, P, topk)` int32; None if every region attends to all regions.
        routed: the attention to the regions in `r_idx`.
        form: form of this attention, one of those in `forms`.
        lists: lists for the kernels that own queries; None for a small map.
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
        """The arrays; `take` makes each of them in a forward, and finds the kept one in a backward."""
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
        routed = packed.routed(r_idx, r_weight)
        form = form_of(routed, packed.routing_learns, chooses=True)
        lists = None if form == SMALL_MAP else take_key_lists(routed, form, take)
        return cls(attention, lse, r_weight, r_idx, routed, form, lists)


def kept_bytes(problem: PackedAttention[Tensor]) -> int:
    """Bytes that a forward keeps for its backward."""
    plan = Plan(problem.tensors, problem.qkv.device)
    ForwardArrays.take(_packed(plan, problem), True, plan.keep)
    return plan.kept_bytes


def plan_attend(problem: PackedAttention[Tensor], trains: bool) -> Plan:
    """Plan of the forward.

    Its inputs are the problem's tensors. Its outputs are the attention's output, LePE included, and, if
    `trains`, the bytes that are kept for the backward.
    """
    plan = Plan(problem.tensors, problem.qkv.device)
    packed = _packed(plan, problem)
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
    """The gradients that a backward writes, all outputs of its plan; None for those that are not needed."""

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
            # With a separate `kv`, the attention writes nothing to the key and value channels of this
            # gradient; only LePE writes, to the value channels. The rest must be zero.
            plan.output(qkv.shape, qkv.dtype, zeroed=packed.kv is not None),
            like(packed.kv, True),
            plan.output(means_shape, torch.float32) if packed.routing_learns else None,
            like(packed.lepe_weight, needs.lepe_weight),
            like(packed.lepe_bias, needs.lepe_bias),
            plan.output((packed.dim,), torch.float32) if has_fill else None,
        )

    def maps(self, packed: PackedAttention[Buffer]) -> Gradients[Buffer]:
        """Gradients of queries, keys and values, as slices of the packed gradients."""
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
    """Plan of the backward.

    Its inputs are the problem's tensors, the output's gradient, the output, and the bytes that the forward
    kept. Its outputs are the gradients of `qkv`, of `kv`, of the region means, and of LePE's weight, bias and
    fill; then the attention's shares of the gradient of padding. `Plan.wanted` tells, for each output after
    the first, whether it exists.
    """
    plan = Plan((*problem.tensors, *saved), problem.qkv.device)
    packed = _packed(plan, problem)
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
    """Adds the backward of a small map; returns shares of the padding's gradient, if `needs_padding`."""
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
    """Adds the backward of the other forms; returns shares of the padding's gradient, if `needs_padding`."""
    assert arrays.lists is not None
    maps = gradients.maps(packed)
    attention = Attention(arrays.routed, arrays.form, arrays.lists)
    statistics, factor_shares = launch_query_gradient(
        plan, attention, saved, maps.query, packed.routing_learns
    )
    query_lists = launch_query_lists(plan, arrays.routed, arrays.lists)
    # Routed: LePE's backward comes first, and dK/dV adds to its values' gradient. Rows of the inverse graph
    # may be cut; in this order one launch sums both the pieces of rows and LePE's shares. Other forms: no row
    # is cut, and LePE's backward comes last and adds, because dK/dV has no register left for adding (compiled
    # for sm_90).
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
    """Adds the gradients that the routing weights pass to region queries and keys, and these to the map.

    The map gets them only if region queries and keys are its means.
    """
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


def _packed(plan: Plan, problem: PackedAttention[Tensor]) -> PackedAttention[Buffer]:
    """The problem whose tensors are the first of the plan's inputs."""
    return PackedAttention.of(plan.inputs[: len(problem.tensors)], problem.settings)


def _region_queries_keys(plan: Plan, packed: PackedAttention[Buffer]) -> tuple[Buffer, Buffer]:
    """Region queries and keys, `(N, P, qk_dim)` float32 each: `packed.means` or, without it, means of `qkv`.

    Without `packed.means` it adds the launch that computes the means.
    """
    settings, means = packed.settings, packed.means
    if means is None:
        shape = (packed.qkv.shape[0], settings.grid.n_regions, 2 * settings.qk_dim)
        means = plan.scratch(shape, torch.float32)
        padding = packed.padding if settings.counts_padding else None
        launch_region_means(plan, packed.qkv, padding, settings.grid, means)
    return channels(means, 0, settings.qk_dim), channels(means, settings.qk_dim, 2 * settings.qk_dim)
