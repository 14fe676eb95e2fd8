"""Attention of every query to all keys under a mask, where that is faster than gathering keys and values.

Nothing is gathered or reordered here: a fused attention of PyTorch's reads queries, keys and values in place,
and a mask made from the routing hides the keys of regions that were not chosen. On the CPU that is faster if
regions are small, since each key that is gathered for a region of a few tokens serves only a few queries; on
NVIDIA's GPUs it is if the map is small, where gathering takes a launch for every step, and more memory than
the mask.
"""

import math

import torch
from torch import Tensor

from ...kernels.grid import RegionGrid
from ...kernels.problem import Gradients, Padding, RoutedAttention, statistic_dtype
from . import chunks, devices, efficient
from .regions import sum_over_padding, whole_map

# The most elements of one image's mask: 4 MiB of float32, enough for maps of up to 1024 tokens.
MOST_MASKED = 2 * chunks.CHUNK_ELEMENTS
# The cost of gathering, where one score under a mask costs 1: for each region, for each of its gathered keys,
# and for each pair of a gathered key and a query. Fitted to float32 maps of 49 to 1600 tokens in regions of 1
# to 36 tokens, on two cores of an x86 server; near the boundary, half precision and float64 may lose up to a
# fifth of the time by this rule. It uses a mask for BiFormer's third stage, but not for YOLO's P5;
# `bra-bench peers` has the times.
_REGION, _KEY, _PAIR = 300, 32, 1.5
# On NVIDIA GPUs a mask is used if the number of keys in the map, times the bytes of an element, is at most
# this many times `topk`. At this boundary the products with all keys take as long as the memory traffic of
# gathering, some twelve passes over the chosen keys and values in a training step. That is predicted for a T4
# (20 TFLOP/s of attention in float16, 5 in float32, 300 GB/s) and for an H100 (200, 40 and 3000 GB/s), which
# agree within a fifth; it was not timed. On the H100 a training step of attention to all keys, without a
# mask, took 46 us at BiFormer's third stage and 82 us at YOLO's P5; gathering took 381 and 738 us
# (docs/gpu_check.md).
_BYTES_A_CHOICE = 400


def is_cheaper(problem: RoutedAttention[Tensor], kernel: chunks.Kernel) -> bool:
    """Whether to attend under a mask: if the problem and the kernel permit it, and it takes less time."""
    if problem.r_idx is None or problem.factor is not None or problem.n_graphs != 1 or not problem.distinct:
        return False
    grid, kv_grid, topk = problem.query_grid, problem.kv_grid, problem.topk
    if kernel is chunks.FLASH:
        return is_cheaper_for(grid, kv_grid, topk)
    keys = kv_grid.n_regions * kv_grid.region_tokens
    is_small = grid.height * grid.width * keys <= MOST_MASKED
    few = keys * problem.query.element_size() <= _BYTES_A_CHOICE * topk
    return kernel is chunks.EFFICIENT and is_small and few


def is_cheaper_for(grid: RegionGrid, kv_grid: RegionGrid, topk: int) -> bool:
    """Whether a mask is faster than gathering on the CPU for these sizes, if the problem permits a mask."""
    queries, region_keys = grid.region_tokens, kv_grid.region_tokens
    keys, chosen = kv_grid.n_regions * region_keys, topk * region_keys
    fits = grid.n_regions * queries * keys <= MOST_MASKED
    return fits and queries * keys <= _REGION + chosen * (_KEY + _PAIR * queries)


def images_at_once(problem: RoutedAttention[Tensor]) -> int:
    """The number of images whose masks together fit in one chunk."""
    grid, kv_grid = problem.query_grid, problem.kv_grid
    elements = grid.height * grid.width * kv_grid.n_regions * kv_grid.region_tokens
    if _is_on_cpu(problem):
        return chunks.CHUNK_ELEMENTS // elements
    return chunks.CHUNK_BYTES // (elements * problem.query.element_size())


def attend(problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor) -> bool:
    """Writes the results of `attention.attend_routed`; returns False if `out` shows that they may be wrong.

    Under a mask, a key or value that is not finite affects all queries of its head, even those whose regions
    did not choose it. So the results are right only if all of `out` is finite. On a GPU that is not checked,
    as it would wait for the device: there such a number makes all of its head NaN, as in the kernels for
    masked attention of the Triton backend. Whether every row has a softmax must be read from `lse` on the
    CPU; see `chunks.is_softmax`.
    """
    maps, on_cpu = _maps(problem), _is_on_cpu(problem)
    if on_cpu:
        query, key, value = (_swapped(x) for x in maps)
        heads, statistic = chunks.flash_forward(query, key, value, problem.scale, _mask(problem))
        rows = _swapped(heads).contiguous()
    else:
        rows, statistic = efficient.forward(*maps, problem.scale, _aligned_mask(problem))
    out.copy_(rows.view(out.shape))
    lse.copy_(statistic.view(lse.shape))
    return not on_cpu or _is_finite(rows)


def attend_backward(
    grad_out: Tensor,
    problem: RoutedAttention[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Gradients[Tensor],
) -> chunks.SmallGradients | None:
    """As `attention.attention_backward`; but on the CPU returns None if a gradient is not finite.

    A key or value that was not chosen may be the cause, and then the gradients are wrong. They are not
    written then.
    """
    kv_grid, sums = problem.kv_grid, []
    maps = (_heads(grad_out, problem.num_heads), *_maps(problem), _heads(out, problem.num_heads))
    statistic = lse.flatten(2)
    if _is_on_cpu(problem):
        grad_heads, query, key, value, heads = (_swapped(x) for x in maps)
        mask = _mask(problem)
        of_heads = chunks.flash_backward(grad_heads, query, key, value, heads, statistic, problem.scale, mask)
        found = [_swapped(x).contiguous() for x in of_heads]
        if not all(_is_finite(grad) for grad in found):
            return None
    else:
        found = [*efficient.backward(*maps, statistic, problem.scale, _aligned_mask(problem))]
    grad_query, *of_keys_values = found
    gradients.query.copy_(grad_query.view(gradients.query.shape))
    for target, grad in zip((gradients.key, gradients.value), of_keys_values, strict=True):
        whole = grad.flatten(2).unflatten(1, (kv_grid.rows * kv_grid.region_height, -1))
        target.copy_(whole[:, : kv_grid.height, : kv_grid.width])
        if problem.padding is not None:
            sums.append(sum_over_padding(whole, kv_grid))
    return chunks.SmallGradients(None, Padding(*sums) if sums else None)


def _is_on_cpu(problem: RoutedAttention[Tensor]) -> bool:
    return devices.kind(problem.query) == "cpu"


def _maps(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `(n, tokens, m, c)`, for `n` images and `m` heads; keys include padding."""
    grid, padding = problem.kv_grid, problem.padding
    key = whole_map(problem.key, grid, None if padding is None else padding.key)
    value = whole_map(problem.value, grid, None if padding is None else padding.value)
    query, key, value = (_heads(x, problem.num_heads) for x in (problem.query, key, value))
    return query, key, value


def _region_mask(problem: RoutedAttention[Tensor], hidden: float) -> Tensor:
    """The number to add to the scores, `(n, P, P_kv)`: 0 for chosen regions, `hidden` for all others."""
    assert problem.r_idx is not None
    r_idx = problem.r_idx[:, 0].long()
    sizes = (len(r_idx), problem.query_grid.n_regions, problem.kv_grid.n_regions)
    return problem.query.new_full(sizes, hidden).scatter_(2, r_idx, 0.0)


def _mask(problem: RoutedAttention[Tensor]) -> Tensor:
    """The mask for the CPU, `(n, 1, H*W, L)`: 0 for keys of chosen regions, else minus infinity."""
    grid, device = problem.query_grid, problem.query.device
    of_query = _regions(grid, device)[: grid.height, : grid.width].flatten()
    # Expand the keys first, while the mask has only one row for each query region, and then the queries.
    of_key = _regions(problem.kv_grid, device).flatten()
    mask = _region_mask(problem, -math.inf).index_select(2, of_key)
    return mask.index_select(1, of_query)[:, None]


def _aligned_mask(problem: RoutedAttention[Tensor]) -> Tensor:
    """The mask for `efficient`, `(n, m, H*W, L)`; all heads share its memory.

    Regions are expanded to tokens by two copies of broadcast views: the indices that the CPU uses would have
    to be made on the device first.
    """
    grid, kv_grid, dtype = problem.query_grid, problem.kv_grid, problem.query.dtype
    hidden = efficient.hidden(dtype)
    mask = _region_mask(problem, hidden)
    batch, n_keys = len(mask), kv_grid.n_regions * kv_grid.region_tokens
    sides = (grid.rows, grid.region_height, grid.columns, grid.region_width)
    rows = mask.view(batch, grid.rows, 1, grid.columns, 1, -1).expand(batch, *sides, -1)
    rows = rows.reshape(batch, sides[0] * sides[1], sides[2] * sides[3], -1)[:, : grid.height, : grid.width]
    whole = mask.new_empty(batch, grid.height, grid.width, efficient.aligned_length(n_keys, dtype))
    tokens = whole[..., :n_keys]
    kv_sides = (kv_grid.rows, kv_grid.region_height, kv_grid.columns, kv_grid.region_width)
    of_regions = rows.unflatten(3, (kv_grid.rows, 1, kv_grid.columns, 1))
    tokens.unflatten(3, kv_sides).copy_(of_regions)
    # The backward also adds what lies between the rows to scores, which it multiplies by keys of 0.
    if whole.shape[-1] > n_keys:
        whole[..., n_keys:].fill_(hidden)
    return tokens.flatten(1, 2)[:, None].expand(-1, problem.num_heads, -1, -1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Views `(n, H, W, m*c)` as `(n, H*W, m, c)`."""
    return x.flatten(1, 2).unflatten(-1, (num_heads, -1))


def _swapped(x: Tensor) -> Tensor:
    """Exchanges the axes of tokens and heads, a view: flash attention on the CPU wants heads first."""
    return x.transpose(1, 2)


def _is_finite(x: Tensor) -> bool:
    """Whether all elements of `x` are finite, judged by their sum.

    If the sum of finite elements overflows, the answer is False, too, and the caller gathers instead. `x`
    must be contiguous: otherwise PyTorch takes a hundred times as long. `isfinite` of every element would
    take ten times as long as the sum, a fifth of the forward of BiFormer's third stage.
    """
    return math.isfinite(x.sum(dtype=statistic_dtype(x.dtype)).item())


def _regions(grid: RegionGrid, device: torch.device) -> Tensor:
    """The region number of every token of a map with its padding: `(rows*h, columns*w)`."""
    regions = torch.arange(grid.n_regions, device=device).view(grid.rows, grid.columns)
    return regions.repeat_interleave(grid.region_height, 0).repeat_interleave(grid.region_width, 1)
