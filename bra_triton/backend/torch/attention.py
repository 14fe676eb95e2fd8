"""Token-to-token attention on the torch backend, in chunks of regions: memory is linear in the map.

Chunks are small enough for the cache: a chunk's routed keys and values are gathered, attended to and dropped;
the backward gathers them again. Queries are read from their map, and outputs written to theirs, chunk by
chunk.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.problem import Gradients, Padding, RoutedAttention, SmallGradients, statistic_dtype
from . import chunks
from .autocast import outside_autocast
from .regions import (
    add_rows,
    by_region,
    empty_map,
    flat_index,
    sum_over_padding,
    whole_map,
    without_padding,
    write_map,
)


@outside_autocast
def attend_routed(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`; the statistic is the natural logarithm of the softmax's denominator."""
    grid, n_graphs = problem.query_grid, problem.n_graphs
    out = empty_map(problem.query, grid, channels=problem.value.shape[-1])
    lse = empty_map(problem.query, grid, problem.num_heads, statistic_dtype(out.dtype))
    out_regions, lse_regions = (by_region(x, grid, n_graphs) for x in (out, lse))
    for chunk in _chunks(problem):
        out_chunk, lse_chunk = chunks.forward(chunk.query, *chunk.weighted(), problem.scale)
        _write(out_regions[chunk.box], _merge_heads(out_chunk))
        _write(lse_regions[chunk.box], rearrange(lse_chunk, "r m s -> r s m"))
    return without_padding(out, grid), dense(rearrange(without_padding(lse, grid), "n h w m -> n m h w"))


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
    grid, kv_grid, n_graphs = problem.query_grid, problem.kv_grid, problem.n_graphs
    lse = rearrange(lse, "n m h w -> n h w m")
    maps = [by_region(whole_map(x, grid), grid, n_graphs) for x in (grad_out, out, lse)]
    grad_query = empty_map(problem.query, grid) if grid.is_padded else gradients.query
    grad_query_regions = by_region(grad_query, grid, n_graphs)
    # Half precision adds up to P*topk terms a key here: accumulate them in float32.
    dtype = statistic_dtype(grad_out.dtype)
    n_rows = problem.batch * n_graphs * kv_grid.n_regions
    grad_key, grad_value = (
        x.new_zeros(n_rows, kv_grid.region_tokens, x.shape[-1] // n_graphs, dtype=dtype)
        for x in (problem.key, problem.value)
    )
    shape = (problem.batch, n_graphs, grid.rows, grid.columns, problem.topk)
    grad_factor = out.new_zeros(shape, dtype=dtype) if needs_factor else None
    for chunk in _chunks(problem):
        grad_rows, out_rows, lse_rows = (_read(x[chunk.box]) for x in maps)
        key, value = chunk.weighted()
        chunk_query, chunk_key, chunk_value = chunks.backward(
            *(_split_heads(grad_rows, chunk.num_heads), chunk.query, key, value),
            *(_split_heads(out_rows, chunk.num_heads), rearrange(lse_rows, "r s m -> r m s"), problem.scale),
        )
        _write(grad_query_regions[chunk.box], _merge_heads(chunk_query))
        if grad_factor is not None:
            part = grad_factor[chunk.box]
            part.copy_(chunk.factor_gradient(chunk_key, chunk_value, dtype).view(part.shape))
        for total, grad in ((grad_key, chunk_key), (grad_value, chunk_value)):
            addends = rearrange(grad, "r m (t s) c -> (r t) s (m c)", t=problem.topk).to(dtype)
            if chunk.factor is not None:
                addends = addends * chunk.factor.flatten()[:, None, None].to(dtype)
            add_rows(total, chunk.index, addends)
    if grid.is_padded:
        gradients.query.copy_(grad_query[:, : grid.height, : grid.width])
    write_map(gradients.key, grad_key, kv_grid, n_graphs)
    write_map(gradients.value, grad_value, kv_grid, n_graphs)
    factor = None if grad_factor is None else grad_factor.flatten(2, 3)
    if problem.padding is None:
        return SmallGradients(factor, None)
    sums = (sum_over_padding(grad, kv_grid, n_graphs) for grad in (grad_key, grad_value))
    return SmallGradients(factor, Padding(*sums))


_Box = tuple[slice, ...]


@dataclass(frozen=True)
class _Chunk:
    """Some query regions and all that they attend to; every graph counts as an image of its own.

    Attributes:
        box: where they are in `by_region`: images, graphs, rows and columns of regions.
        index: `(R*topk,)` int32: chosen regions, as rows of `_key_value_regions`.
        query: `(R, m, S, c)`.
        key: gathered, `(R, m, topk*S_kv, c)`.
        value: gathered, `(R, m, topk*S_kv, c)`.
        factor: `(R, topk)` or None.
    """

    box: _Box
    index: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    factor: Tensor | None

    @property
    def num_heads(self) -> int:
        """Heads of one graph, `m`."""
        return self.query.shape[1]

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Keys and values times their factor."""
        if self.factor is None:
            return self.key, self.value
        repeats = self.key.shape[2] // self.factor.shape[1]
        factor = self.factor.repeat_interleave(repeats, dim=1)[:, None, :, None]
        return self.key * factor.to(self.key.dtype), self.value * factor.to(self.value.dtype)

    def factor_gradient(self, grad_key: Tensor, grad_value: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of the factor, `(R, topk)`, for those of the weighted keys and values."""
        topk = self.index.numel() // len(self.query)
        of_key, of_value = (
            rearrange(grad.to(dtype) * x.to(dtype), "r m (t s) c -> r t (m s c)", t=topk).sum(-1)
            for grad, x in ((grad_key, self.key), (grad_value, self.value))
        )
        return of_key + of_value


def _chunks(problem: RoutedAttention[Tensor]) -> Iterator[_Chunk]:
    """The problem in chunks of whole regions."""
    grid, topk, n_graphs = problem.query_grid, problem.topk, problem.n_graphs
    num_heads = problem.num_heads // n_graphs
    query = by_region(whole_map(problem.query, grid), grid, n_graphs)
    key_value, widths = _key_value_regions(problem)
    shape = query.shape[:4]
    r_idx = flat_index(_r_idx(problem), problem.kv_grid.n_regions).view(*shape, topk)
    factor = None if problem.factor is None else problem.factor.view(*shape, topk)
    per_region = topk * problem.kv_grid.region_tokens * sum(widths)
    for box in _boxes(shape, chunks.CHUNK_ELEMENTS // per_region):
        index = r_idx[box].flatten()
        key, value = (
            rearrange(x, "(r t) s (m c) -> r m (t s) c", t=topk, m=num_heads)
            for x in key_value.index_select(0, index).split(widths, dim=-1)
        )
        yield _Chunk(
            *(box, index, _split_heads(_read(query[box]), num_heads), key, value),
            None if factor is None else factor[box].flatten(0, 3),
        )


def _key_value_regions(problem: RoutedAttention[Tensor]) -> tuple[Tensor, list[int]]:
    """Keys and values of every region side by side, `(N*G*P_kv, S_kv, c_k + c_v)`; and `c_k` and `c_v`."""
    grid, n_graphs, padding = problem.kv_grid, problem.n_graphs, problem.padding
    fills = (None, None) if padding is None else (padding.key, padding.value)
    views = [
        by_region(whole_map(x, grid, fill), grid, n_graphs)
        for x, fill in zip((problem.key, problem.value), fills, strict=True)
    ]
    widths = [view.shape[-1] for view in views]
    regions = problem.key.new_empty(*views[0].shape[:-1], sum(widths))
    for part, view in zip(regions.split(widths, dim=-1), views, strict=True):
        part.copy_(view)
    return regions.flatten(4, 5).flatten(0, 3), widths


def _boxes(sizes: Sequence[int], most: int) -> Iterator[_Box]:
    """Cuts a space of these sizes into boxes of at most `most` cells, but of one at least."""
    steps: list[int] = []
    for size in reversed(sizes):
        steps.insert(0, max(1, min(size, most)))
        most //= max(1, size)
    starts = itertools.product(*(range(0, size, step) for size, step in zip(sizes, steps, strict=True)))
    for start in starts:
        yield tuple(slice(at, at + step) for at, step in zip(start, steps, strict=True))


def _read(regions: Tensor) -> Tensor:
    """A box of `by_region` as `(R, S, C)`."""
    return regions.flatten(4, 5).flatten(0, 3)


def _write(regions: Tensor, rows: Tensor) -> None:
    """Undoes `_read`."""
    regions.copy_(rows.view(regions.shape))


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "r s (m c) -> r m s c", m=num_heads)


def _merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "r m s c -> r s (m c)")


def _r_idx(problem: RoutedAttention[Tensor]) -> Tensor:
    """The chosen regions; of one region, itself."""
    if problem.r_idx is not None:
        return problem.r_idx
    return problem.query.new_zeros((problem.batch, 1, 1, 1), dtype=torch.int32)
