"""Attention of every query to all keys under a mask; on the CPU faster than gathering if regions are small.

In a region of a few tokens, each gathered key serves only a few queries. Here nothing is gathered or
reordered: PyTorch's flash attention reads queries, keys and values in place, and a mask made from the routing
hides the keys of regions that were not chosen.
"""

import math

import torch
from torch import Tensor

from ...kernels.grid import RegionGrid
from ...kernels.problem import Gradients, Padding, RoutedAttention, SmallGradients, statistic_dtype
from . import chunks, devices
from .regions import sum_over_padding, whole_map

# The most elements of one image's mask: 4 MiB of float32, enough for maps of up to 1024 tokens.
MOST_MASKED = 2 * chunks.CHUNK_ELEMENTS
# The cost of gathering, where one score under a mask costs 1: for each region, for each of its gathered keys,
# and for each pair of a gathered key and a query. Fitted to float32 maps of 49 to 1600 tokens in regions of 1
# to 36 tokens, on two cores of an x86 server; near the boundary, half precision and float64 may lose up to a
# fifth of the time by this rule. It uses a mask for BiFormer's third stage, but not for YOLO's P5;
# `bra-bench peers` has the times.
_REGION, _KEY, _PAIR = 300, 32, 1.5


def is_cheaper(problem: RoutedAttention[Tensor]) -> bool:
    """Whether to attend under a mask: on the CPU, if the problem permits it and it takes less time."""
    if devices.kind(problem.query) != "cpu" or problem.r_idx is None or problem.factor is not None:
        return False
    return (
        problem.distinct
        and problem.n_graphs == 1
        and problem.qk_head_dim == problem.v_head_dim
        and is_cheaper_for(problem.query_grid, problem.kv_grid, problem.topk)
    )


def is_cheaper_for(grid: RegionGrid, kv_grid: RegionGrid, topk: int) -> bool:
    """Whether a mask is faster than gathering for these sizes, if the problem permits a mask."""
    queries, region_keys = grid.region_tokens, kv_grid.region_tokens
    keys, chosen = kv_grid.n_regions * region_keys, topk * region_keys
    fits = grid.n_regions * queries * keys <= MOST_MASKED
    return fits and queries * keys <= _REGION + chosen * (_KEY + _PAIR * queries)


def images_at_once(problem: RoutedAttention[Tensor]) -> int:
    """The number of images whose masks together fit in one chunk."""
    grid, kv_grid = problem.query_grid, problem.kv_grid
    return chunks.CHUNK_ELEMENTS // (grid.height * grid.width * kv_grid.n_regions * kv_grid.region_tokens)


def attend(problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor) -> bool:
    """Writes the results of `attention.attend_routed`; returns False if `out` shows that they may be wrong.

    Under a mask, a key or value that is not finite affects all queries of its head, even those whose regions
    did not choose it. So the results are right only if all of `out` is finite. Whether every row has a
    softmax must be read from `lse`; see `chunks.is_softmax`.
    """
    rows, statistic = chunks.flash_forward(*_maps(problem), scale=problem.scale, mask=_mask(problem))
    tokens = _tokens(rows)
    out.copy_(tokens.view(out.shape))
    lse.copy_(statistic.view(lse.shape))
    return _is_finite(tokens)


def attend_backward(
    grad_out: Tensor,
    problem: RoutedAttention[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Gradients[Tensor],
) -> SmallGradients[Tensor] | None:
    """As `attention.attention_backward`; but returns None, and writes nothing, if a gradient is not finite.

    A key or value that was not chosen may be the cause, and then the gradients are wrong.
    """
    kv_grid, sums = problem.kv_grid, []
    grad_rows, rows = (_heads(x, problem.num_heads) for x in (grad_out, out))
    found = chunks.flash_backward(
        *(grad_rows, *_maps(problem), rows, lse.flatten(2)), scale=problem.scale, mask=_mask(problem)
    )
    grad_query, *of_keys_values = (_tokens(grad) for grad in found)
    if not all(_is_finite(grad) for grad in (grad_query, *of_keys_values)):
        return None
    gradients.query.copy_(grad_query.view(gradients.query.shape))
    for target, grad in zip((gradients.key, gradients.value), of_keys_values, strict=True):
        whole = grad.unflatten(1, (kv_grid.rows * kv_grid.region_height, -1))
        target.copy_(whole[:, : kv_grid.height, : kv_grid.width])
        if problem.padding is not None:
            sums.append(sum_over_padding(whole, kv_grid))
    return SmallGradients(None, Padding(*sums) if sums else None)


def _maps(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `(n, m, tokens, c)`, for `n` images and `m` heads; keys include padding."""
    grid, padding = problem.kv_grid, problem.padding
    key = whole_map(problem.key, grid, None if padding is None else padding.key)
    value = whole_map(problem.value, grid, None if padding is None else padding.value)
    query, key, value = (_heads(x, problem.num_heads) for x in (problem.query, key, value))
    return query, key, value


def _mask(problem: RoutedAttention[Tensor]) -> Tensor:
    """The mask to add to the scores, `(n, 1, H*W, L)`: 0 for keys of chosen regions, else minus infinity."""
    assert problem.r_idx is not None
    grid, kv_grid, r_idx = problem.query_grid, problem.kv_grid, problem.r_idx[:, 0].long()
    of_query = _regions(grid)[: grid.height, : grid.width].flatten()
    mask = problem.query.new_full((len(r_idx), grid.n_regions, kv_grid.n_regions), -math.inf)
    # Expand the keys first, while the mask has only one row for each query region, and then the queries.
    mask = mask.scatter_(2, r_idx, 0.0).index_select(2, _regions(kv_grid).flatten())
    return mask.index_select(1, of_query)[:, None]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Views `(n, H, W, m*c)` as `(n, m, H*W, c)`."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Undoes `_heads`, except that tokens stay one axis: `(n, m, L, c)` to `(n, L, m*c)`, contiguous."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _is_finite(x: Tensor) -> bool:
    """Whether all elements of `x` are finite, judged by their sum.

    If the sum of finite elements overflows, the answer is False, too, and the caller gathers instead. `x`
    must be contiguous: otherwise PyTorch takes a hundred times as long. `isfinite` of every element would
    take ten times as long as the sum, a fifth of the forward of BiFormer's third stage.
    """
    return math.isfinite(x.sum(dtype=statistic_dtype(x.dtype)).item())


def _regions(grid: RegionGrid) -> Tensor:
    """The region number of every token of a map with its padding: `(rows*h, columns*w)`."""
    regions = torch.arange(grid.n_regions).view(grid.rows, grid.columns)
    return regions.repeat_interleave(grid.region_height, 0).repeat_interleave(grid.region_width, 1)
