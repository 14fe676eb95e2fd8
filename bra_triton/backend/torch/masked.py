"""Attention of every query to all keys under a mask: on the CPU cheaper than gathering, for small regions.

With regions of a few tokens a gathered key serves a few queries. Here nothing is gathered or reordered:
PyTorch's flash attention reads queries, keys and values where they lie, and a mask made of the routing hides
what was not chosen.
"""

import math

import torch
from torch import Tensor

from ...kernels.grid import RegionGrid
from ...kernels.problem import Gradients, Padding, RoutedAttention, SmallGradients, statistic_dtype
from . import chunks, devices
from .regions import sum_over_padding, whole_map

# Elements of an image's mask, 4 MiB of float32: maps of up to 1024 tokens.
MOST_MASKED = 2 * chunks.CHUNK_ELEMENTS
# What gathering costs, in scores under a mask: for each region, for each of its keys, and for each key and
# query. Fitted to float32 maps of 49 to 1600 tokens in regions of 1 to 36, on two cores of an x86 server;
# near the boundary half precision and float64 may lose up to a fifth. BiFormer's third stage is found to be
# cheaper under a mask, YOLO's P5 not; `bra-bench peers` has the times.
_REGION, _KEY, _PAIR = 300, 32, 1.5


def is_cheaper(problem: RoutedAttention[Tensor]) -> bool:
    """Whether to attend under a mask: on the CPU, where it can and takes less time than gathering."""
    if devices.kind(problem.query) != "cpu" or problem.r_idx is None or problem.factor is not None:
        return False
    return (
        problem.distinct
        and problem.n_graphs == 1
        and problem.qk_head_dim == problem.v_head_dim
        and is_cheaper_for(problem.query_grid, problem.kv_grid, problem.topk)
    )


def is_cheaper_for(grid: RegionGrid, kv_grid: RegionGrid, topk: int) -> bool:
    """Whether to attend under a mask, of an attention of these sizes that can be."""
    queries, region_keys = grid.region_tokens, kv_grid.region_tokens
    keys, chosen = kv_grid.n_regions * region_keys, topk * region_keys
    fits = grid.n_regions * queries * keys <= MOST_MASKED
    return fits and queries * keys <= _REGION + chosen * (_KEY + _PAIR * queries)


def images_at_once(problem: RoutedAttention[Tensor]) -> int:
    """How many images' masks are no larger than a chunk."""
    grid, kv_grid = problem.query_grid, problem.kv_grid
    return chunks.CHUNK_ELEMENTS // (grid.height * grid.width * kv_grid.n_regions * kv_grid.region_tokens)


def attend(problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor) -> bool:
    """Writes what `attention.attend_routed` returns, and says whether it is right, as far as `out` tells.

    Something that is not finite, maybe of a key not chosen, would reach all queries of its head. `lse` tells
    whether there was a softmax; see `chunks.is_softmax`.
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
    """As `attention.attention_backward`; None where something is not finite, maybe of a key not chosen."""
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
    """Queries, keys and values, `(n, m, tokens, c)`."""
    grid, padding = problem.kv_grid, problem.padding
    key = whole_map(problem.key, grid, None if padding is None else padding.key)
    value = whole_map(problem.value, grid, None if padding is None else padding.value)
    query, key, value = (_heads(x, problem.num_heads) for x in (problem.query, key, value))
    return query, key, value


def _mask(problem: RoutedAttention[Tensor]) -> Tensor:
    """What is added to the scores, `(n, 1, H*W, L)`: 0 of chosen regions' keys, else minus infinity."""
    assert problem.r_idx is not None
    grid, kv_grid, r_idx = problem.query_grid, problem.kv_grid, problem.r_idx[:, 0].long()
    of_query = _regions(grid)[: grid.height, : grid.width].flatten()
    mask = problem.query.new_full((len(r_idx), grid.n_regions, kv_grid.n_regions), -math.inf)
    # Keys first: as few rows as there are regions are spread over all keys.
    mask = mask.scatter_(2, r_idx, 0.0).index_select(2, _regions(kv_grid).flatten())
    return mask.index_select(1, of_query)[:, None]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """`(n, H, W, m*c)` as `(n, m, H*W, c)`, a view."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Undoes `_heads`, but for height and width: `(n, m, L, c)` as `(n, L, m*c)`, contiguous."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _is_finite(x: Tensor) -> bool:
    """False if anything in `x` is not finite; also if its sum overflows, and then gathering serves.

    `x` is contiguous, or PyTorch would take a hundred times as long. `isfinite` of every element takes ten
    times as long, a fifth of the forward of BiFormer's third stage.
    """
    return math.isfinite(x.sum(dtype=statistic_dtype(x.dtype)).item())


def _regions(grid: RegionGrid) -> Tensor:
    """The region of every token of a map with its padding, `(rows*h, columns*w)`."""
    regions = torch.arange(grid.n_regions).view(grid.rows, grid.columns)
    return regions.repeat_interleave(grid.region_height, 0).repeat_interleave(grid.region_width, 1)
