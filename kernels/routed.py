"""Plans of an attention to regions that are given, forward and backward."""

import torch
from torch import Tensor

from .arrays import Buffer
from .attention.arguments import ForwardResults, Saved
from .attention.launch import (
    Attention,
    launch_attention,
    launch_finish,
    launch_key_value_gradient,
    launch_query_gradient,
)
from .forms import form_of
from .plan import Plan
from .problem import Gradients, Padding, RoutedAttention
from .routing.lists import launch_key_lists, launch_query_lists, take_key_lists


def plan_attend_routed(problem: RoutedAttention[Tensor]) -> Plan:
    """Plan of the forward: from the problem's tensors, `out` and `lse` (float32, `(N, num_heads, H, W)`)."""
    plan, routed = _routed_plan(problem, ())
    (batch, height, width, _), num_heads = routed.query.shape, routed.num_heads
    out = plan.output((batch, height, width, routed.value.shape[-1]), routed.query.dtype)
    lse = plan.output((batch, num_heads, height, width), torch.float32)
    attention = _listed(plan, routed)
    launch_attention(plan, attention, None, ForwardResults(out, None, lse))
    return plan


def plan_attend_routed_backward(
    problem: RoutedAttention[Tensor], saved: tuple[Tensor, Tensor, Tensor]
) -> Plan:
    """Plan of the backward: from the problem's tensors, `grad_out`, `out` and `lse`, the maps' gradients."""
    plan, routed = _routed_plan(problem, saved)
    grad_out, out, lse = plan.given[-3:]
    gradients = Gradients(*(plan.output(x.shape, x.dtype) for x in (routed.query, routed.key, routed.value)))
    attention = _listed(plan, routed)
    statistics, _ = launch_query_gradient(plan, attention, Saved(out, lse, grad_out), gradients.query)
    query_lists = launch_query_lists(plan, routed, attention.lists)
    of_keys_values = launch_key_value_gradient(plan, attention, query_lists, statistics, grad_out, gradients)
    launch_finish(plan, of_keys_values)
    return plan


def _routed_plan(
    problem: RoutedAttention[Tensor], saved: tuple[Tensor, ...]
) -> tuple[Plan, RoutedAttention[Buffer]]:
    """A plan with the inputs `problem.tensors` and `saved`, and the same problem in the plan's buffers."""
    plan = Plan((*problem.tensors, *saved), problem.query.device)
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
    """The attention and its lists; adds the launches that write the lists."""
    form = form_of(routed)
    lists = take_key_lists(routed, form, plan.scratch)
    launch_key_lists(plan, routed, lists)
    return Attention(routed, form, lists)
