"""Launches of the kernels that write lists: tokens of routed regions, inverse graph, pieces of its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import RegionGrid
from ..lib.integers import cdiv, next_power_of_2
from ..problem import RoutedAttention
from .arguments import GraphConfig, ListConfig, MarkConfig, Marks
from .graph import cut_rows_kernel, invert_graph_kernel, list_tokens_kernel, mark_choices_kernel

# A row of the inverse graph longer than this many times the mean is cut, so that one region chosen by all
# does not stall the grid. The partial sums of cut rows take at most 2 / LONGEST_TO_MEAN of a float32 copy of
# keys and values.
LONGEST_TO_MEAN = 4
_BLOCK_ENTRIES, _BLOCK_TOKENS, _BLOCK_PAIRS = 8, 32, 256


@dataclass(frozen=True)
class KeyLists:
    """What the kernels that own queries walk.

    Attributes:
        region_list: `(P, S)` int32, tokens of the query regions.
        key_list: `(N, G, P, topk * S_kv)` int32, keys of every region; -1 is padding.
        factors: `(N, G, P, topk * S_kv)` float32, or None.
        marks: None; or what masked attention needs, whose one `key_list` is `(P_kv * S_kv,)`.
    """

    region_list: Tensor
    key_list: Tensor
    factors: Tensor | None
    marks: Marks | None = None


@dataclass(frozen=True)
class QueryLists:
    """What the kernel that owns keys walks.

    Attributes:
        region_list: `(P_kv, S_kv)` int32, tokens of the key regions.
        query_list: `(N, G, P * topk * S)` int32, queries of every pair in the order of the inverse graph.
        factors: of the same shape, float32, or None.
        row_start: `(N, G, P_kv + 1)` int32, rows of the inverse graph, in pairs.
        work: `(N, G, P_kv + extras, 4)` int32, see `graph`.
        longest: pairs in the longest piece of a row.
        n_partials: partial sums that pieces of one graph write, at most.
        marks: None; or what masked attention needs, whose one `query_list` is `(P * S,)`; it has no inverse
            graph and no pieces.
    """

    region_list: Tensor
    query_list: Tensor
    factors: Tensor | None
    row_start: Tensor | None
    work: Tensor | None
    longest: int
    n_partials: int
    marks: Marks | None = None


def list_keys(problem: RoutedAttention, masked: bool = False) -> KeyLists:
    """Tokens of the query regions, and keys that each of them attends to; masked: all, and marks of those."""
    if masked:
        query_regions, key_regions = _list_regions(problem)
        return KeyLists(query_regions, key_regions.view(-1), None, mark_choices(problem))
    shape = (*problem.r_idx.shape[:3], problem.topk * problem.kv_grid.region_tokens)
    keys, key_regions, factors = _list_tokens(problem.r_idx, problem.kv_grid, problem)
    if problem.query_grid == problem.kv_grid:
        query_regions = key_regions
    else:
        _, query_regions, _ = _list_tokens(None, problem.query_grid, problem)
    return KeyLists(query_regions, keys.view(shape), None if factors is None else factors.view(shape))


def list_queries(problem: RoutedAttention, masked: bool = False) -> QueryLists:
    """Tokens of the key regions, and queries that attend to each of them; masked: all, and marks of those."""
    if masked:
        query_regions, key_regions = _list_regions(problem)
        return QueryLists(key_regions, query_regions.view(-1), None, None, None, 0, 0, mark_choices(problem))
    row_start, pairs = inverse_graph(problem.r_idx, problem.kv_grid.n_regions)
    work, longest, n_partials = cut_rows(row_start, pairs.shape[-1])
    queries, query_regions, factors = _list_tokens(pairs, problem.query_grid, problem, from_pairs=True)
    if problem.query_grid == problem.kv_grid:
        key_regions = query_regions
    else:
        _, key_regions, _ = _list_tokens(None, problem.kv_grid, problem)
    shape = (*pairs.shape[:2], pairs.shape[-1] * problem.query_grid.region_tokens)
    return QueryLists(
        key_regions,
        queries.view(shape),
        None if factors is None else factors.view(shape),
        row_start,
        work,
        longest,
        n_partials,
    )


def mark_choices(problem: RoutedAttention) -> Marks:
    """Writes the tables of masked attention; at most 64 key regions."""
    r_idx, block = problem.r_idx, max(16, next_power_of_2(problem.kv_grid.n_regions))
    n_queries, n_keys = (
        grid.n_regions * grid.region_tokens for grid in (problem.query_grid, problem.kv_grid)
    )
    n_rows = r_idx.shape[0] * r_idx.shape[1] * r_idx.shape[2]
    marks = Marks(
        r_idx.new_empty(n_queries),
        r_idx.new_empty(*r_idx.shape[:3], block, dtype=torch.float16),
        r_idx.new_empty(n_keys, block, dtype=torch.float16),
    )
    with torch.cuda.device_of(r_idx):
        mark_choices_kernel[(cdiv(max(n_rows, n_queries, n_keys), _BLOCK_ENTRIES),)](
            *(r_idx, marks),
            *(n_rows, problem.topk, n_queries, problem.query_grid.region_tokens),
            *(n_keys, problem.kv_grid.region_tokens),
            CONFIG=MarkConfig(_BLOCK_ENTRIES, block),
            num_warps=1,
        )
    return marks


def inverse_graph(r_idx: Tensor, n_regions: int) -> tuple[Tensor, Tensor]:
    """Inverts the routing graph into compressed rows.

    Args:
        r_idx: contiguous `(N, G, P, topk)` int32, entries in `[0, n_regions)`.
        n_regions: key regions, `P_kv`.

    Returns:
        `row_start` `(N, G, P_kv + 1)` and `pairs` `(N, G, P * topk)`, both int32: row `r` of a graph,
        `pairs[row_start[r] : row_start[r + 1]]`, lists the pairs `query_region * topk + slot` that chose key
        region `r`, ascending.
    """
    batch, n_graphs, n_rows, topk = r_idx.shape
    n_pairs = n_rows * topk
    row_start = r_idx.new_empty(batch, n_graphs, n_regions + 1)
    pairs = r_idx.new_empty(batch, n_graphs, n_pairs)
    if batch:
        with torch.cuda.device_of(r_idx):
            invert_graph_kernel[(batch * n_graphs * n_regions,)](
                *(r_idx, row_start, pairs, n_pairs, n_regions), CONFIG=GraphConfig(_BLOCK_PAIRS), num_warps=4
            )
    return row_start, pairs


def cut_rows(row_start: Tensor, n_pairs: int) -> tuple[Tensor, int, int]:
    """Cuts the inverse graph's rows into pieces of at most `LONGEST_TO_MEAN` times the mean row.

    Args:
        row_start: `(N, G, P_kv + 1)` from `inverse_graph`.
        n_pairs: pairs in a graph.

    Returns:
        `work` `(N, G, P_kv + extras, 4)` int32 (see `graph`), the pairs in the longest piece, and how
        many partial sums the pieces of one graph write at most. Sizes depend on shapes alone.
    """
    batch, n_graphs, n_regions = *row_start.shape[:2], row_start.shape[2] - 1
    longest = LONGEST_TO_MEAN * cdiv(n_pairs, n_regions)
    # Every further piece follows a full one, and a cut row has one first piece for its further ones.
    n_extras = n_pairs // longest
    work = row_start.new_empty(batch, n_graphs, n_regions + n_extras, 4)
    if batch:
        with torch.cuda.device_of(row_start):
            cut_rows_kernel[(batch * n_graphs,)](
                *(row_start, work, n_regions, n_extras, longest),
                CONFIG=GraphConfig(_BLOCK_PAIRS),
                num_warps=4,
            )
    return work, longest, 2 * n_extras


def _list_regions(problem: RoutedAttention) -> tuple[Tensor, Tensor]:
    """Tokens of all query regions, and of all key regions."""
    keys = queries = _list_tokens(None, problem.kv_grid, problem)[1]
    if problem.query_grid != problem.kv_grid:
        queries = _list_tokens(None, problem.query_grid, problem)[1]
    return queries, keys


def _list_tokens(
    entries: Tensor | None, grid: RegionGrid, problem: RoutedAttention, from_pairs: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens of the listed regions, of all regions in order, and the listed ones' factors."""
    like = problem.r_idx
    n_entries = 0 if entries is None else entries.numel()
    tokens = like.new_empty(n_entries, grid.region_tokens)
    region_list = like.new_empty(grid.n_regions, grid.region_tokens)
    factor = problem.factor if n_entries else None
    factors = None if factor is None else torch.empty_like(tokens, dtype=torch.float32)
    with torch.cuda.device_of(like):
        list_tokens_kernel[(cdiv(n_entries + grid.n_regions, _BLOCK_ENTRIES),)](
            *(tokens if entries is None else entries, factor, tokens, region_list, factors),
            *(n_entries, like.shape[2] * like.shape[3], like.shape[3]),
            *(grid.region_height, grid.region_width, grid.columns, grid.height, grid.width, grid.n_regions),
            CONFIG=ListConfig(from_pairs, _BLOCK_ENTRIES, _BLOCK_TOKENS),
            num_warps=4,
        )
    return tokens, region_list, factors
