"""Token-to-token attention on the torch backend, in chunks of regions: memory is linear in the map.

Chunks are small enough for the cache: a chunk's routed keys and values are gathered, attended to and dropped;
the backward gathers them again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.problem import Gradients, Padding, RoutedAttention, SmallGradients, statistic_dtype
from . import chunks
from .autocast import outside_autocast
from .regions import add_rows, flat_index, from_regions, sum_over_padding, to_regions

# Elements of a chunk's gathered keys and values. Measured on two cores of an x86 server over maps of 14 to
# 80 tokens a side: 2**19 (2 MiB of float32) is within 8 % of the best of 2**17 to 2**22 everywhere.
CHUNK_ELEMENTS = 1 << 19


@outside_autocast
def attend_routed(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`; the statistic is the natural logarithm of the softmax's denominator."""
    regions = _Regions.of(problem)
    n_rows, n_tokens = regions.query.shape[:2]
    out = regions.value.new_empty(n_rows, n_tokens, regions.value.shape[-1])
    lse = out.new_empty(n_rows, regions.num_heads, n_tokens, dtype=statistic_dtype(out.dtype))
    for chunk in _chunks(problem, regions):
        out_chunk, lse[chunk.rows, :, chunk.tokens] = chunks.forward(
            chunk.query, *chunk.weighted(), problem.scale
        )
        out[chunk.rows, chunk.tokens] = _merge_heads(out_chunk)
    lse_map = from_regions(rearrange(lse, "r m s -> r s m"), problem.query_grid, problem.n_graphs)
    # Not a view of the regions, which PyTorch would let nobody change in place.
    out = dense(from_regions(out, problem.query_grid, problem.n_graphs)).data
    return out, dense(rearrange(lse_map, "n h w m -> n m h w"))


@outside_autocast
def attend_routed_backward(
    grad_out: Tensor, problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor
) -> Gradients[Tensor]:
    """See `FusedKernels`."""
    gradients = Gradients(*(x.new_empty(x.shape) for x in (problem.query, problem.key, problem.value)))
    attention_backward(grad_out, problem, out, lse, gradients)
    return gradients


def attention_backward(
    grad_out: Tensor,
    problem: RoutedAttention[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Gradients[Tensor],
    needs_factor: bool = False,
) -> SmallGradients[Tensor]:
    """Writes the gradients of the maps, and returns the others; the same bits for the same input.

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
    dtype = statistic_dtype(grad_out.dtype)
    grad_query, grad_key, grad_value = (
        torch.zeros_like(x, dtype=dtype) for x in (regions.query, regions.key, regions.value)
    )
    grad_factor = torch.zeros(regions.r_idx.shape, dtype=dtype, device=out.device) if needs_factor else None
    for chunk in _chunks(problem, regions):
        at = chunk.rows, chunk.tokens
        key, value = chunk.weighted()
        chunk_query, chunk_key, chunk_value = chunks.backward(
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
            add_rows(total, regions.r_idx[chunk.rows].flatten(), addends)
    for target, grad, grid in (
        (gradients.query, grad_query, problem.query_grid),
        (gradients.key, grad_key, problem.kv_grid),
        (gradients.value, grad_value, problem.kv_grid),
    ):
        target.copy_(from_regions(grad, grid, n_graphs))
    factor = None if grad_factor is None else grad_factor.view(-1, n_graphs, *_choices(problem))
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
    def of(cls, problem: RoutedAttention[Tensor]) -> "_Regions":
        n_graphs, padding = problem.n_graphs, problem.padding
        return cls(
            to_regions(problem.query, problem.query_grid, n_graphs),
            to_regions(problem.key, problem.kv_grid, n_graphs, padding.key if padding else None),
            to_regions(problem.value, problem.kv_grid, n_graphs, padding.value if padding else None),
            flat_index(_r_idx(problem), problem.kv_grid.n_regions),
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


def _chunks(problem: RoutedAttention[Tensor], regions: _Regions) -> Iterator[_Chunk]:
    """Chunks of the problem; regions are split only where a single one's scores pass the chunk's size."""
    num_heads, topk = regions.num_heads, problem.topk
    n_rows, n_tokens = regions.query.shape[:2]
    list_length = topk * regions.key.shape[1]
    per_row = list_length * (regions.key.shape[2] + regions.value.shape[2])
    token_step = n_tokens
    if not chunks.is_fused(regions.query, problem.qk_head_dim, problem.v_head_dim):
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


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "r s (m c) -> r m s c", m=num_heads)


def _merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "r m s c -> r s (m c)")


def _choices(problem: RoutedAttention[Tensor]) -> tuple[int, int]:
    return problem.query_grid.n_regions, problem.topk


def _r_idx(problem: RoutedAttention[Tensor]) -> Tensor:
    """The chosen regions; of one region, itself."""
    if problem.r_idx is not None:
        return problem.r_idx
    return problem.query.new_zeros((problem.batch, 1, 1, 1), dtype=torch.int32)
