"""The torch backend: any device, any floating dtype, memory linear in the map.

Regions are processed in chunks small enough for the cache: a chunk's routed keys and values are gathered,
attended to and dropped; the backward gathers them again. The functions of this file are what every backend
has.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..kernels.grid import RegionGrid
from ..kernels.problem import Gradients, Lepe, Padding, RoutedAttention, SmallGradients
from ..routing import select_topk
from . import chunk_attention
from .region_layout import counted_tokens, from_regions, pad_map, sum_over_padding, to_regions
from .torch_lepe import lepe_backward, lepe_forward
from .torch_pooling import pool_backward, pool_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "lepe_backward",
    "pool_backward",
    "pool_forward",
    "region_means",
    "route",
    "route_backward",
]

# Elements of a chunk's gathered keys and values. Measured on two cores of an x86 server over maps of 14 to
# 80 tokens a side: 2**19 (2 MiB of float32) is within 8 % of the best of 2**17 to 2**22 everywhere.
CHUNK_ELEMENTS = 1 << 19


def region_means(qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
    """Means over every region's tokens.

    Args:
        qkv: `(N, H, W, packed_dim)`.
        padding: `(packed_dim,)`, what tokens past the map's edge hold; None to leave them out.
        grid: the regions; without `padding` each has a token of the map.
        channels: how many of the first channels to take.

    Returns:
        `(N, P, channels)`: float32; float64 for float64.
    """
    x = qkv[..., :channels]
    if grid.is_padded:
        x = pad_map(x, grid, None if padding is None else padding[:channels])
    tokens = rearrange(x, "n (j h) (i w) c -> n j h i w c", j=grid.rows, i=grid.columns)
    # Columns first: each of the two sums then runs along memory that the other left dense.
    sums = tokens.sum(4, dtype=_statistic_dtype(qkv.dtype)).sum(2).flatten(1, 2)
    return sums / counted_tokens(grid, padding, qkv.device)


def route(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Chooses the `topk` key regions of the largest logits for every query region.

    Args:
        query: `(N, P, qk_dim)`, region queries.
        key: `(N, P, qk_dim)`, region keys.
        topk: regions to choose.
        scale: factor of the logits.

    Returns:
        `r_weight`, the softmax over the chosen logits, of the dtype of `query`, and `r_idx` (int32), both
        `(N, P, topk)`; equal logits by the smaller index first.
    """
    top_logits, r_idx = select_topk((query * scale) @ key.transpose(-2, -1), topk)
    return top_logits.softmax(dim=-1), r_idx.int()


def route_backward(
    grad_weight: Tensor, r_weight: Tensor, r_idx: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `route`'s query and key, `(N, P, qk_dim)`, for the gradient of `r_weight`."""
    grad_logits = r_weight * (grad_weight - (r_weight * grad_weight).sum(-1, keepdim=True)) * scale
    rows, keys = query.flatten(0, 1), key.flatten(0, 1)
    grad_query, grad_key = torch.zeros_like(rows), torch.zeros_like(keys)
    index, weight = _flat_index(r_idx[:, None], key.shape[1]), grad_logits.flatten(0, 1)
    for slot in range(r_idx.shape[-1]):
        grad_query += weight[:, slot, None] * keys.index_select(0, index[:, slot])
        _add_rows(grad_key, index[:, slot], weight[:, slot, None] * rows)
    return grad_query.view_as(query), grad_key.view_as(key)


def attention_forward(
    problem: RoutedAttention, lepe: Lepe | None = None, keep_attention: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attends from every query region to the key regions it chose, and adds LePE.

    Args:
        problem: what to attend to.
        lepe: the convolution to add; None for none.
        keep_attention: return the attention's share of the output, which the backward needs.

    Returns:
        `out` `(N, H, W, num_heads * v_head_dim)` of the maps' dtype, contiguous; the attention's share of it,
        None without LePE and where it is not kept; and `lse` `(N, num_heads, H, W)`: the logarithm of the
        softmax's denominator, float32; float64 for float64.
    """
    regions = _Regions.of(problem)
    n_rows, n_tokens = regions.query.shape[:2]
    out = regions.value.new_empty(n_rows, n_tokens, regions.value.shape[-1])
    lse = out.new_empty(n_rows, regions.num_heads, n_tokens, dtype=_statistic_dtype(out.dtype))
    for chunk in _chunks(problem, regions):
        out_chunk, lse[chunk.rows, :, chunk.tokens] = chunk_attention.forward(
            chunk.query, *chunk.weighted(), problem.scale
        )
        out[chunk.rows, chunk.tokens] = _merge_heads(out_chunk)
    lse_map = from_regions(rearrange(lse, "r m s -> r s m"), problem.query_grid, problem.n_graphs)
    out = from_regions(out, problem.query_grid, problem.n_graphs).contiguous()
    lse = rearrange(lse_map, "n h w m -> n m h w").contiguous()
    if lepe is None:
        return out, None, lse
    return lepe_forward(out, lepe), out if keep_attention else None, lse


def attention_backward(
    grad_out: Tensor,
    problem: RoutedAttention,
    out: Tensor,
    lse: Tensor,
    gradients: Gradients,
    needs_factor: bool = False,
) -> SmallGradients:
    """Gradients of one attention; the same bits for the same input.

    Args:
        grad_out: `(N, H, W, num_heads * v_head_dim)`.
        problem: the forward's.
        out: the attention's share of what the forward returned.
        lse: what the forward returned.
        gradients: maps to write.
        needs_factor: compute the gradient of the factor, too.
    """
    regions, n_graphs = _Regions.of(problem), problem.n_graphs
    out_regions, grad_regions = (to_regions(x, problem.query_grid, n_graphs) for x in (out, grad_out))
    lse_regions = to_regions(rearrange(lse, "n m h w -> n h w m"), problem.query_grid, n_graphs)
    # Half precision adds up to P*topk terms a key here: accumulate them in float32.
    dtype = _statistic_dtype(grad_out.dtype)
    grad_query, grad_key, grad_value = (
        torch.zeros_like(x, dtype=dtype) for x in (regions.query, regions.key, regions.value)
    )
    grad_factor = torch.zeros(regions.r_idx.shape, dtype=dtype, device=out.device) if needs_factor else None
    for chunk in _chunks(problem, regions):
        at = chunk.rows, chunk.tokens
        key, value = chunk.weighted()
        chunk_query, chunk_key, chunk_value = chunk_attention.backward(
            *(_split_heads(grad_regions[at], regions.num_heads), chunk.query, key, value),
            _split_heads(out_regions[at], regions.num_heads),
            *(rearrange(lse_regions[at], "r s m -> r m s"), problem.scale),
        )
        grad_query[at] = _merge_heads(chunk_query).to(dtype)
        if grad_factor is not None:
            grad_factor[chunk.rows] += chunk.factor_gradient(chunk_key, chunk_value, dtype)
        for total, part in ((grad_key, chunk_key), (grad_value, chunk_value)):
            addends = rearrange(part, "r m (t s) c -> (r t) s (m c)", t=problem.topk).to(dtype)
            if chunk.factor is not None:
                addends = addends * chunk.factor.flatten()[:, None, None].to(dtype)
            _add_rows(total, regions.r_idx[chunk.rows].flatten(), addends)
    for target, grad, grid in (
        (gradients.query, grad_query, problem.query_grid),
        (gradients.key, grad_key, problem.kv_grid),
        (gradients.value, grad_value, problem.kv_grid),
    ):
        target.copy_(from_regions(grad, grid, n_graphs))
    factor = None if grad_factor is None else grad_factor.view(problem.r_idx.shape)
    if problem.padding is None:
        return SmallGradients(factor, None)
    sums = (sum_over_padding(grad, problem.kv_grid, n_graphs) for grad in (grad_key, grad_value))
    return SmallGradients(factor, Padding(*sums))


@dataclass(frozen=True)
class _Regions:
    """A problem cut into regions, every graph an image of its own: `R = N*G*P` rows.

    `query` `(R, S, C)`, `key` and `value` `(N*G*P_kv, S_kv, C)`, `r_idx` `(R, topk)` rows of `key`, `factor`
    `(R, topk)` or None, `num_heads` those of one graph.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    r_idx: Tensor
    factor: Tensor | None
    num_heads: int

    @classmethod
    def of(cls, problem: RoutedAttention) -> "_Regions":
        n_graphs, padding = problem.n_graphs, problem.padding
        return cls(
            to_regions(problem.query, problem.query_grid, n_graphs),
            to_regions(problem.key, problem.kv_grid, n_graphs, padding.key if padding else None),
            to_regions(problem.value, problem.kv_grid, n_graphs, padding.value if padding else None),
            _flat_index(problem.r_idx, problem.kv_grid.n_regions),
            None if problem.factor is None else problem.factor.flatten(0, 2),
            problem.num_heads // n_graphs,
        )


@dataclass(frozen=True)
class _Chunk:
    """Some regions and some of their tokens, with all that their queries attend to.

    `query` `(R, m, s, c)`, gathered `key` and `value` `(R, m, topk*S_kv, c)`, `factor` `(R, topk)` or None.
    """

    rows: slice
    tokens: slice
    query: Tensor
    key: Tensor
    value: Tensor
    topk: int
    factor: Tensor | None

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Keys and values times their factor."""
        if self.factor is None:
            return self.key, self.value
        factor = self.factor.repeat_interleave(self.key.shape[2] // self.topk, dim=1)[:, None, :, None]
        return self.key * factor.to(self.key.dtype), self.value * factor.to(self.value.dtype)

    def factor_gradient(self, grad_key: Tensor, grad_value: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of the factor, `(R, topk)`, for those of the weighted keys and values."""
        of_key, of_value = (
            rearrange(grad.to(dtype) * x.to(dtype), "r m (t s) c -> r t (m s c)", t=self.topk).sum(-1)
            for grad, x in ((grad_key, self.key), (grad_value, self.value))
        )
        return of_key + of_value


def _chunks(problem: RoutedAttention, regions: _Regions) -> Iterator[_Chunk]:
    """Chunks of the problem; regions are split only where a single one's scores pass the chunk's size."""
    num_heads, topk = regions.num_heads, problem.topk
    n_rows, n_tokens = regions.query.shape[:2]
    list_length = topk * regions.key.shape[1]
    per_row = list_length * (regions.key.shape[2] + regions.value.shape[2])
    token_step = n_tokens
    if not chunk_attention.is_fused(regions.query, problem.qk_head_dim, problem.v_head_dim):
        scores_per_token = num_heads * list_length
        token_step = min(n_tokens, max(1, CHUNK_ELEMENTS // scores_per_token))
        per_row += scores_per_token * token_step
    step = max(1, CHUNK_ELEMENTS // per_row)
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        index = regions.r_idx[rows].flatten()
        key, value = (
            rearrange(x.index_select(0, index), "(r t) s (m c) -> r m (t s) c", t=topk, m=num_heads)
            for x in (regions.key, regions.value)
        )
        factor = None if regions.factor is None else regions.factor[rows]
        for first in range(0, n_tokens, token_step):
            tokens = slice(first, min(first + token_step, n_tokens))
            query = _split_heads(regions.query[rows, tokens], num_heads)
            yield _Chunk(rows, tokens, query, key, value, topk, factor)


def _flat_index(r_idx: Tensor, n_regions: int) -> Tensor:
    """Rows of all graphs' regions: `(N, G, P, topk)` to `(N*G*P, topk)`."""
    batch, n_graphs = r_idx.shape[:2]
    first = torch.arange(batch * n_graphs, device=r_idx.device, dtype=r_idx.dtype) * n_regions
    return (r_idx.flatten(0, 1) + first[:, None, None]).flatten(0, 1)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """`total[index] += rows` in a fixed order."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        # index_add_ uses atomics there; accumulating index_put_ sorts.
        total.index_put_((index.long(),), rows, accumulate=True)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "r s (m c) -> r m s c", m=num_heads)


def _merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "r m s c -> r s (m c)")


def _statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
