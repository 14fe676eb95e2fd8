"""Plans of routing without an attention: region means, the choice of regions, and its gradient."""

import torch
from torch import Tensor

from ..grid import RegionGrid
from ..plan import Plan
from .launch import Routing, launch_region_means, launch_route, launch_route_gradient
from .lists import launch_inverse


def plan_region_means(tensors: tuple[Tensor, Tensor | None], grid: RegionGrid, channels: int) -> Plan:
    """Plan: from `(qkv, padding)`, the means of the first `channels` channels over every region's tokens."""
    plan = Plan(tensors, tensors[0].device)
    means = plan.output((tensors[0].shape[0], grid.n_regions, channels), torch.float32)
    launch_region_means(plan, plan.given[0], plan.inputs[1], grid, means)
    return plan


def plan_route(tensors: tuple[Tensor, Tensor], topk: int, scale: float) -> Plan:
    """Plan: from region queries and keys, the routing weights and the chosen regions, `(N, P, topk)` both."""
    plan = Plan(tensors, tensors[0].device)
    query, key = plan.given
    shape = (*query.shape[:2], topk)
    r_weight, r_idx = plan.output(shape, torch.float32), plan.output(shape, torch.int32)
    launch_route(plan, Routing(query, key, r_weight, r_idx, scale))
    return plan


def plan_route_backward(tensors: tuple[Tensor, ...], scale: float) -> Plan:
    """Plan: from `(grad_weight, r_weight, r_idx, query, key)`, the gradients of `query` and `key`."""
    plan = Plan(tensors, tensors[0].device)
    grad_weight, r_weight, r_idx, query, key = plan.given
    batch, n_regions, topk = r_idx.shape
    grad_query, grad_key = (plan.output(query.shape, torch.float32) for _ in range(2))
    inverse = launch_inverse(plan, r_idx.view(batch, 1, n_regions, topk), n_regions)
    shares = grad_weight.view(batch, 1, n_regions, 1, topk)
    launch_route_gradient(
        plan, Routing(query, key, r_weight, r_idx, scale), shares, inverse, grad_query, grad_key
    )
    return plan
