"""Routing on the torch backend: region means, the choice of regions, and its gradient."""

import torch
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.grid import RegionGrid
from ...kernels.padding import counted_tokens
from ...kernels.problem import statistic_dtype
from ...topk import select_topk
from . import devices
from .autocast import outside_autocast
from .regions import flat_index, whole_map
from .sums import Bags, add_rows, bag_sums, has_bags


@outside_autocast
def region_means(qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
    """See `FusedKernels`."""
    x = whole_map(qkv[..., :channels], grid, None if padding is None else padding[:channels])
    sides = (grid.rows, grid.region_height, grid.columns, grid.region_width)
    tokens = x.view(x.shape[0], *sides, channels)
    # Sum over a region's columns first and over its rows second, so that both sums read contiguous memory.
    sums = tokens.sum(4, dtype=statistic_dtype(qkv.dtype)).sum(2).flatten(1, 2)
    return sums / counted_tokens(grid, padding is not None, qkv.device)


@outside_autocast
def route(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`."""
    r_weight, r_idx = choose(query, key, topk, scale, weighs=True)
    assert r_weight is not None
    return r_weight, r_idx


def choose(query: Tensor, key: Tensor, topk: int, scale: float, weighs: bool) -> tuple[Tensor | None, Tensor]:
    """As `route`, but `r_weight` is None unless `weighs`."""
    top_logits, r_idx = _select_topk(torch.bmm(query * scale, key.transpose(1, 2)), topk)
    return dense(top_logits.softmax(dim=-1)) if weighs else None, dense(r_idx.int())


def _select_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """As `select_topk`, but faster on the CPU, where sorting all logits takes up to three times as long."""
    if devices.kind(logits) == "cpu" and topk < logits.shape[-1]:
        values, indices = torch.topk(logits, topk + 1)
        # torch.topk does not define the order of equal logits, so its result is used only if the logits
        # strictly descend. If one of them is NaN, the comparison is false, and `select_topk` sorts, too.
        if (values[..., 1:] < values[..., :-1]).all():
            return values[..., :topk], indices[..., :topk]
    return select_topk(logits, topk)


@outside_autocast
def route_backward(
    grad_weight: Tensor, r_weight: Tensor, r_idx: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`."""
    grad_logits = r_weight * (grad_weight - (r_weight * grad_weight).sum(-1, keepdim=True)) * scale
    rows, keys = query.flatten(0, 1), key.flatten(0, 1)
    index, weight = flat_index(r_idx[:, None], key.shape[1]).flatten(0, 2), grad_logits.flatten(0, 1)
    if has_bags(rows):
        topk, chosen, weight = r_idx.shape[-1], index.flatten(), weight.flatten()
        starts = torch.arange(0, len(chosen), topk, dtype=chosen.dtype, device=chosen.device)
        grad_query = bag_sums(keys, chosen, starts, weight)
        grad_key = Bags.of(chosen, range(len(keys))).sums(rows, weight, topk)
        return grad_query.view_as(query), grad_key.view_as(key)
    grad_query, grad_key = rows.new_zeros(rows.shape), keys.new_zeros(keys.shape)
    for slot in range(r_idx.shape[-1]):
        grad_query += weight[:, slot, None] * keys.index_select(0, index[:, slot])
        add_rows(grad_key, index[:, slot], weight[:, slot, None] * rows)
    return grad_query.view_as(query), grad_key.view_as(key)
