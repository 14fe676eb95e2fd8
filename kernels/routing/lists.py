"""Lists and marks for the attention kernels: the arrays of each form, and the launches that write them.

`forms` explains the forms. In the form "routed" every region has its own list of tokens. In the forms
"masked" and "whole" there is one list of all tokens; if none of them is padding, there is no list, and the
kernels read the map in its own order.
"""

from dataclasses import dataclass
from math import prod

import torch

from ..arrays import Buffer
from ..forms import MASKED, ROUTED, WHOLE
from ..grid import RegionGrid
from ..lib.integers import cdiv, next_power_of_2
from ..plan import Plan, Take
from ..problem import RoutedAttention
from .arguments import GraphConfig, Inverse, ListConfig, Lists, MarkConfig, Marks
from .graph import invert_graph_kernel, list_tokens_kernel, mark_choices_kernel

# A row of the inverse graph that is longer than this many times the mean row is cut into pieces, so that the
# GPU does not wait for the program of one region that all others chose. The mean also counts the pairs of
# regions that consist of padding; these pairs are in no row. The partial sums of cut rows take at most 2 /
# LONGEST_TO_MEAN of a float32 copy of keys and values.
LONGEST_TO_MEAN = 4
BLOCK_ENTRIES, BLOCK_TOKENS, _BLOCK_PAIRS = 8, 32, 256
# With at most this many key regions, dK/dV processes the rows of a graph from the longest to the shortest, so
# that no long row is begun last. On an H100 this made dK/dV faster, and nearly as fast as with rows of equal
# length (`bra-bench kernel-times`). For this order each program of `invert_graph_kernel` counts the lengths
# of all rows of its graph, which takes far less time than it saves.
_MOST_SORTED = 255
# `_MOST_READ`: the most choices that one launch may read to invert all graphs: 34 MB, which an H100's memory
# moves in 10 us. The program of every key region reads its graph twice, so each choice is read 2 * P_kv
# times. If that is too much, launches before it make coarser inverses, with rows of 64, 64**2, ... key
# regions; such a launch reads each choice at most 128 times. Rows are then long, and are read in steps of up
# to `_MOST_BLOCK`.
_MOST_READ, _FAN_BITS, _MOST_BLOCK = 2**23, 6, 2048


@dataclass(frozen=True)
class KeyLists:
    """Lists and marks for the kernels that own queries; see `arguments.Lists`.

    Attributes:
        query_regions: `(P, S)` int32, tokens of the query regions; None if the map is read without a list.
        key_regions: `(P_kv, S_kv)` int32, tokens of the key regions; the same buffer as `query_regions` if
            the grids are equal.
        key_list: in the form "routed" `(N, G, P, topk * S_kv)` int32, the keys that each query region attends
            to; in the other forms `key_regions` as one row.
        factors: of the shape of `key_list`, float32: factor of each listed key; None for 1.
        marks: the marks of masked attention; None in the other forms.
    """

    query_regions: Buffer | None
    key_regions: Buffer | None
    key_list: Buffer | None
    factors: Buffer | None
    marks: Marks | None

    @property
    def arguments(self) -> Lists:
        """The lists as the kernels take them."""
        return Lists(self.query_regions, self.key_list, self.factors)

    @property
    def of_choice(self) -> tuple[Lists | None, Marks | None]:
        """Lists and marks that `route_kernel` also writes, if keys and queries have the same regions."""
        if self.marks is None:
            return self.arguments, None
        return None if self.query_regions is None else Lists(self.query_regions, None, None), self.marks


@dataclass(frozen=True)
class QueryLists:
    """Lists for the kernels that own keys.

    Attributes:
        arguments: the lists as the kernels take them.
        inverse: the inverse graph; None in the forms "masked" and "whole".
        longest: the most pairs that a piece of a row may have.
        n_pieces: pieces of one graph, unused entries of `work` included.
        n_partials: the most partial sums that the pieces of one graph write.
    """

    arguments: Lists
    inverse: Inverse | None
    longest: int = 0
    n_pieces: int = 1
    n_partials: int = 0


def take_key_lists(problem: RoutedAttention[Buffer], form: str, take: Take) -> KeyLists:
    """The arrays of the lists; `take` makes each of them, or finds the one that an earlier plan has kept."""
    grid, kv_grid = problem.query_grid, problem.kv_grid
    query_regions = key_regions = _take_regions(grid, form, take)
    if kv_grid != grid:
        key_regions = _take_regions(kv_grid, form, take)
    key_list = None if key_regions is None else key_regions.view(prod(key_regions.shape))
    factors = marks = None
    if form == ROUTED:
        listed = (problem.batch, problem.n_graphs, grid.n_regions, problem.topk * kv_grid.region_tokens)
        key_list = take(listed, torch.int32)
        if problem.factor is not None:
            factors = take(listed, torch.float32)
    if form == MASKED:
        block = max(16, next_power_of_2(kv_grid.n_regions))
        marks = Marks(
            take((grid.n_regions * grid.region_tokens,), torch.int32),
            take((problem.batch, problem.n_graphs, grid.n_regions, block), torch.bfloat16),
            take((kv_grid.n_regions * kv_grid.region_tokens, block), torch.bfloat16),
        )
    return KeyLists(query_regions, key_regions, key_list, factors, marks)


def _take_regions(grid: RegionGrid, form: str, take: Take) -> Buffer | None:
    """The list of the tokens of a grid's regions; None where a form reads the map without a list."""
    if form in (MASKED, WHOLE) and not grid.is_padded:
        return None
    return take((grid.n_regions, grid.region_tokens), torch.int32)


def launch_key_lists(plan: Plan, problem: RoutedAttention[Buffer], lists: KeyLists) -> None:
    """Adds the launches that write the lists."""
    routed = lists.marks is None and problem.r_idx is not None
    of_keys = Lists(lists.key_regions, lists.key_list if routed else None, lists.factors)
    if of_keys.region_list is not None:
        _launch_list_tokens(plan, problem, problem.kv_grid, of_keys)
    if lists.query_regions is not None and problem.query_grid != problem.kv_grid:
        _launch_list_tokens(plan, problem, problem.query_grid, Lists(lists.query_regions, None, None))
    if lists.marks is not None:
        _launch_marks(plan, problem, lists)


def launch_query_lists(plan: Plan, problem: RoutedAttention[Buffer], key_lists: KeyLists) -> QueryLists:
    """Adds the launches that write the lists for the kernels that own keys, and returns these lists."""
    grid, kv_grid = problem.query_grid, problem.kv_grid
    own = key_lists.key_regions
    if key_lists.marks is not None or problem.r_idx is None:
        walked = key_lists.query_regions
        return QueryLists(Lists(own, walked and walked.view(grid.n_regions * grid.region_tokens), None), None)
    batch, n_graphs, n_rows, topk = problem.r_idx.shape
    n_pairs, n_regions = n_rows * topk, kv_grid.n_regions
    longest = LONGEST_TO_MEAN * cdiv(n_pairs, n_regions)
    n_extras = n_pairs // longest
    listed = (batch, n_graphs, n_pairs * grid.region_tokens)
    factors = None if problem.factor is None else plan.scratch(listed, torch.float32)
    lists = Lists(own, plan.scratch(listed, torch.int32), factors)
    work = plan.scratch((batch, n_graphs, n_extras + n_regions, 4), torch.int32)
    inverse = launch_inverse(plan, problem.r_idx, n_regions, problem.factor, (lists, work, longest, grid))
    return QueryLists(lists, inverse, longest, n_extras + n_regions, 2 * n_extras)


def launch_inverse(
    plan: Plan,
    r_idx: Buffer,
    n_regions: int,
    factor: Buffer | None = None,
    listing: tuple[Lists, Buffer, int, RegionGrid] | None = None,
) -> Inverse:
    """Adds the launches that invert the routing graph into compressed rows; one launch if regions are few.

    Args:
        plan: where to add it.
        r_idx: `(N, G, P, topk)` int32, contiguous, entries in `[0, n_regions)`.
        n_regions: key regions, `P_kv`.
        factor: `(N, G, P, topk)` float32, factor of every pair.
        listing: the lists of queries to write, the array for the pieces of rows (`work`), the most pairs of a
            piece, and the grid of the queries. None to write rows alone, which then contain all pairs, also
            those of padding.
    """
    coarser = None
    grid = None if listing is None else listing[-1]
    for shift in _coarse_shifts(prod(r_idx.shape), n_regions):
        coarser = _launch_rows(plan, r_idx, n_regions, grid, coarser, shift)
    return _launch_rows(plan, r_idx, n_regions, grid, coarser, 0, factor, listing)


def _launch_rows(
    plan: Plan,
    r_idx: Buffer,
    n_regions: int,
    grid: RegionGrid | None,
    coarser: Inverse | None,
    shift: int,
    factor: Buffer | None = None,
    listing: tuple[Lists, Buffer, int, RegionGrid] | None = None,
) -> Inverse:
    """Adds a launch that writes rows of `2**shift` key regions each, from `coarser` or else from `r_idx`."""
    batch, n_graphs, n_queries, topk = r_idx.shape
    n_pairs, n_rows = n_queries * topk, cdiv(n_regions, 1 << shift)
    lists, work, longest, _ = listing or (None, None, 1, None)
    is_split = shift > 0 or coarser is not None
    bins = next_power_of_2(n_rows + 1) if lists is not None and n_rows <= _MOST_SORTED and not is_split else 1
    n_read = n_pairs if coarser is None else cdiv(n_pairs, coarser.row_start.shape[-1] - 1)
    block = min(_MOST_BLOCK, max(_BLOCK_PAIRS, next_power_of_2(n_read))) if is_split else _BLOCK_PAIRS
    inverse = Inverse(
        plan.scratch((batch, n_graphs, n_rows + 1), torch.int32),
        plan.scratch((batch, n_graphs, n_pairs), torch.int32),
        plan.scratch((batch, n_graphs, n_pairs), torch.int32) if shift else None,
        work,
    )
    plan.launch(
        invert_graph_kernel,
        (batch * n_graphs * n_rows,),
        (r_idx, factor, inverse, coarser, lists),
        (
            *(n_pairs, n_rows, topk, longest),
            *(grid.geometry if grid else (1,) * 5),
            GraphConfig(
                LISTS=lists is not None,
                BLOCK=block,
                BINS=bins,
                SHIFT=shift,
                FAN_BITS=0 if coarser is None else _FAN_BITS,
                SKIPS_PADDING=grid is not None and grid.is_padded and coarser is None,
                BLOCK_ENTRIES=BLOCK_ENTRIES,
                BLOCK_TOKENS=BLOCK_TOKENS,
            ),
        ),
        num_warps=4,
    )
    return inverse


def _coarse_shifts(n_choices: int, n_regions: int) -> list[int]:
    """`shift` of each coarser inverse, the coarsest first; each of its rows has `2**shift` key regions."""
    shifts: list[int] = []
    if n_regions > _MOST_SORTED and 2 * n_regions * n_choices > _MOST_READ:
        while cdiv(n_regions, 1 << _FAN_BITS * len(shifts)) > 1 << _FAN_BITS:
            shifts.insert(0, _FAN_BITS * (len(shifts) + 1))
    return shifts


def _launch_list_tokens(plan: Plan, problem: RoutedAttention[Buffer], grid: RegionGrid, lists: Lists) -> None:
    n_entries = 0
    if lists.token_list is not None:
        assert problem.r_idx is not None
        n_entries = prod(problem.r_idx.shape)
    n_regions = 0 if lists.region_list is None else grid.n_regions
    plan.launch(
        list_tokens_kernel,
        (cdiv(n_entries + n_regions, BLOCK_ENTRIES),),
        (problem.r_idx, problem.factor, lists),
        (n_entries, *grid.geometry, grid.n_regions, ListConfig(BLOCK_ENTRIES, BLOCK_TOKENS)),
        num_warps=4,
    )


def _launch_marks(plan: Plan, problem: RoutedAttention[Buffer], lists: KeyLists) -> None:
    grid, kv_grid, marks = problem.query_grid, problem.kv_grid, lists.marks
    assert marks is not None
    n_rows = problem.batch * problem.n_graphs * grid.n_regions
    n_queries, n_keys = grid.n_regions * grid.region_tokens, kv_grid.n_regions * kv_grid.region_tokens
    plan.launch(
        mark_choices_kernel,
        (cdiv(max(n_rows, n_queries, n_keys), BLOCK_ENTRIES),),
        (problem.r_idx, marks),
        (
            *(n_rows, problem.topk),
            *(n_queries, *_marked_sizes(grid, lists.query_regions)),
            *(n_keys, *_marked_sizes(kv_grid, lists.key_regions)),
            MarkConfig(BLOCK_ENTRIES, marks.key_marks.shape[-1]),
        ),
        num_warps=1,
    )


def _marked_sizes(grid: RegionGrid, region_list: Buffer | None) -> tuple[int, int, int, int]:
    """Sizes from which `mark_tokens` finds the region of a token: in the region list, else in the map."""
    if region_list is not None:
        return 1, grid.region_tokens, 1, grid.region_tokens
    return grid.region_height, grid.region_width, grid.columns, grid.width
