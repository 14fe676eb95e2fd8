"""Kernels that write lists of tokens, marks, and the inverse of the routing graph, for the attention kernels.

A "graph" holds the choices of one image or of one head of an image; an image has `G` graphs. A "pair" is one
choice, with the number `query_region * TOPK + slot`; every graph has exactly `P * TOPK` pairs, so all shapes
are static. A "row" of the inverse graph holds the pairs that chose one key region, except those of query
regions whose queries are all padding. Such regions have equal queries, so they choose the same key regions;
the rows of these would be the longest of all, without any effect on a gradient. A "piece" is a part of a row:
the work of one program for each tile and head.

| array | shape | meaning |
|---|---|---|
| r_idx | (N, G, P, TOPK) int32 | key regions that each query region chose |
| r_weight | (N, G, P, TOPK) fp32 | factor of each pair; None for 1 |
| row_start | (N, G, P_kv + 1) int32 | where each key region's row starts in `pairs` |
| pairs | (N, G, P * TOPK) int32 | the inverse graph: pairs by key region, ascending in each row |
| choices | (N, G, P * TOPK) int32 | the key region of each of `pairs`; a finer inverse is made from it |
| work | (N, G, extras + P_kv, 4) int32 | pieces: region, start and end of pairs, partial sum; -1 for none |

Lists and marks are described in `arguments.Lists` and `arguments.Marks`.
"""

import triton
import triton.language as tl

from ..lib.addressing import corner_of, token_at
from .arguments import MARK

MARKED = tl.constexpr(MARK)


@triton.jit
def list_regions(tokens, factors, place, region, factor, live, sizes, BLOCK_TOKENS: tl.constexpr):
    """Writes the tokens of some regions and, for each of these tokens, the region's factor.

    Args:
        tokens: (places, region_tokens) int32.
        factors: of the shape of `tokens`, fp32; None to write no factors.
        place: (entries,), the row of `tokens` to which each region's tokens go.
        region: (entries,).
        factor: (entries,) fp32; used only with `factors`.
        live: (entries,), False for entries that are not written.
        sizes: region_height, region_width, columns, height and width, see `token_of`.
        BLOCK_TOKENS: tokens of a step.
    """
    region_height, region_width, columns, height, width = sizes
    region_tokens = region_height * region_width
    corner = corner_of(region[:, None], region_height, region_width, columns)
    for start in tl.range(0, region_tokens, BLOCK_TOKENS):
        index = start + tl.arange(0, BLOCK_TOKENS)[None, :]
        token = token_at(corner, index, region_width, height, width)
        at = place.to(tl.int64)[:, None] * region_tokens + index
        written = live[:, None] & (index < region_tokens)
        tl.store(tokens + at, token, mask=written)
        if factors is not None:
            tl.store(factors + at, factor[:, None] + tl.zeros([1, BLOCK_TOKENS], tl.float32), mask=written)


@triton.jit(
    do_not_specialize=[
        *("n_entries", "region_height", "region_width", "columns", "height", "width", "n_regions"),
    ]
)
def list_tokens_kernel(
    r_idx,
    r_weight,
    lists,
    n_entries,
    region_height,
    region_width,
    columns,
    height,
    width,
    n_regions,
    CONFIG: tl.constexpr,
):
    """Lists the tokens of BLOCK_ENTRIES chosen regions; grid (blocks of entries,).

    The entries after the last choice are all regions, in order: their tokens go to the region list. A list
    that is None is not written.
    """
    place = tl.program_id(0).to(tl.int64) * CONFIG.BLOCK_ENTRIES + tl.arange(0, CONFIG.BLOCK_ENTRIES)
    listed = place < n_entries
    sizes = (region_height, region_width, columns, height, width)
    if lists.token_list is not None:
        region = tl.load(r_idx + place, mask=listed, other=0)
        factor = None
        if lists.factors is not None:
            factor = tl.load(r_weight + place, mask=listed, other=0.0)
        list_regions(
            lists.token_list, lists.factors, place, region, factor, listed, sizes, CONFIG.BLOCK_TOKENS
        )
    if lists.region_list is not None:
        region = (place - n_entries).to(tl.int32)
        exists = ~listed & (region < n_regions)
        list_regions(lists.region_list, None, region, region, None, exists, sizes, CONFIG.BLOCK_TOKENS)


@triton.jit
def _region_of(token, sizes):
    """The region of a token; `sizes` are region height and width, columns, and the map's width."""
    region_height, region_width, columns, width = sizes
    row = token // width
    return row // region_height * columns + (token - row * width) // region_width


@triton.jit
def mark_tokens(marks, row, n_queries, sizes, n_keys, kv_sizes, BLOCK_MARKS: tl.constexpr):
    """Writes the rows `row` of two tables of `marks`: each query's region, and each key's marks.

    `_region_of` takes `sizes` for queries and `kv_sizes` for keys. For tokens that are listed region after
    region, S in each, the sizes are (1, S, 1, S), as if every region were a row of the map.
    """
    region = tl.arange(0, BLOCK_MARKS)[None, :]
    tl.store(marks.query_regions + row, _region_of(row, sizes), mask=row < n_queries)
    own = tl.where(_region_of(row, kv_sizes)[:, None] == region, MARKED, 0.0).to(tl.bfloat16)
    at = row.to(tl.int64)[:, None] * BLOCK_MARKS + region
    tl.store(marks.key_marks + at, own, mask=(row < n_keys)[:, None])


@triton.jit(
    do_not_specialize=[
        *("n_rows", "topk", "n_queries", "region_height", "region_width", "columns", "width"),
        *("n_keys", "kv_region_height", "kv_region_width", "kv_columns", "kv_width"),
    ]
)
def mark_choices_kernel(
    r_idx,
    marks,
    n_rows,
    topk,
    n_queries,
    region_height,
    region_width,
    columns,
    width,
    n_keys,
    kv_region_height,
    kv_region_width,
    kv_columns,
    kv_width,
    CONFIG: tl.constexpr,
):
    """Writes the tables of `Marks` for a given graph; each program writes BLOCK_ROWS rows of every table.

    The product of a query's and a key's marks is 0 if the query's region chose the key's region, else
    -MARK**2; bfloat16 holds both exactly. The matrix unit adds this mask to the scores, without an
    instruction per score.
    """
    BLOCK_ROWS: tl.constexpr = CONFIG.BLOCK_ROWS
    BLOCK_MARKS: tl.constexpr = CONFIG.BLOCK_MARKS
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    region = tl.arange(0, BLOCK_MARKS)[None, :]
    own_marks = tl.full([BLOCK_ROWS, BLOCK_MARKS], -MARKED, tl.float32)
    for slot in tl.range(0, topk):
        choice = tl.load(r_idx + row.to(tl.int64) * topk + slot, mask=row < n_rows, other=-1)
        own_marks = tl.where(choice[:, None] == region, 0.0, own_marks)
    at = row.to(tl.int64)[:, None] * BLOCK_MARKS + region
    tl.store(marks.query_marks + at, own_marks.to(tl.bfloat16), mask=(row < n_rows)[:, None])
    sizes = (region_height, region_width, columns, width)
    kv_sizes = (kv_region_height, kv_region_width, kv_columns, kv_width)
    mark_tokens(marks, row, n_queries, sizes, n_keys, kv_sizes, BLOCK_MARKS)


@triton.jit
def _load_choices(choices, pair, last, nobody, topk, sizes, CONFIG: tl.constexpr):
    """Key regions of some pairs; `nobody` past the last pair, and if all queries of a pair are padding."""
    choice = tl.load(choices + pair, mask=pair < last, other=nobody)
    if CONFIG.SKIPS_PADDING:
        region_height, region_width, columns, height, width = sizes
        top, left = corner_of(pair // topk, region_height, region_width, columns)
        choice = tl.where((top < height) & (left < width), choice, nobody)
    return choice


@triton.jit(
    do_not_specialize=[
        *("n_pairs", "n_rows", "topk", "longest"),
        *("region_height", "region_width", "columns", "height", "width"),
    ]
)
def invert_graph_kernel(
    r_idx,
    r_weight,
    inverse,
    coarser,
    lists,
    n_pairs,
    n_rows,
    topk,
    longest,
    region_height,
    region_width,
    columns,
    height,
    width,
    CONFIG: tl.constexpr,
):
    """Writes one row: its pairs, its pieces, and the list of its pairs' queries; grid (N * G * n_rows,).

    A stable counting sort without atomics: every program counts the choices of smaller rows, which gives the
    start of its row, and then writes the pairs of its row in order. For each of these two steps it reads the
    whole graph or, with `coarser`, only one of the coarser rows: the one that its row is a part of. A coarser
    row covers 2**FAN_BITS rows. A row covers one key region, or 2**SHIFT key regions if this inverse is
    itself a coarser one; see `lists.launch_inverse`.

    Without LISTS it writes neither pieces nor lists.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    BINS: tl.constexpr = CONFIG.BINS
    SHIFT: tl.constexpr = CONFIG.SHIFT
    sizes = (region_height, region_width, columns, height, width)
    row = tl.program_id(0) % n_rows
    graph = (tl.program_id(0) // n_rows).to(tl.int64)
    choices = r_idx + graph * n_pairs
    first, last = 0, n_pairs
    # Not `if coarser is not None`: `coarser.work` is None, see the end of `attention_forward_kernel`.
    if CONFIG.FAN_BITS > 0:
        choices = coarser.choices + graph * n_pairs
        n_coarser = ((n_rows - 1) >> CONFIG.FAN_BITS) + 1
        bounds = coarser.row_start + graph * (n_coarser + 1) + (row >> CONFIG.FAN_BITS)
        first, last = tl.load(bounds), tl.load(bounds + 1)
    start = first
    length = 0
    lengths = tl.zeros([BINS], tl.int32)
    for step in tl.range(first, last, BLOCK):
        index = step + tl.arange(0, BLOCK)
        choice = _load_choices(choices, index, last, n_rows << SHIFT, topk, sizes, CONFIG) >> SHIFT
        start += tl.sum((choice < row).to(tl.int32), axis=0)
        length += tl.sum((choice == row).to(tl.int32), axis=0)
        if BINS > 1:  # `nobody`, which is n_rows here, has a bin, too
            lengths += tl.histogram(choice, BINS)
    tl.store(inverse.row_start + graph * (n_rows + 1) + row, start)
    if row == n_rows - 1:
        tl.store(inverse.row_start + graph * (n_rows + 1) + n_rows, start + length)

    next_free = graph * n_pairs + start
    for step in tl.range(first, last, BLOCK):
        index = step + tl.arange(0, BLOCK)
        choice = _load_choices(choices, index, last, n_rows << SHIFT, topk, sizes, CONFIG)
        chosen = (choice >> SHIFT) == row
        pair = index
        if CONFIG.FAN_BITS > 0:
            pair = tl.load(coarser.pairs + graph * n_pairs + index, mask=chosen, other=0)
        place = next_free + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(inverse.pairs + place, pair, mask=chosen)
        if inverse.choices is not None:
            tl.store(inverse.choices + place, choice, mask=chosen)
        next_free += tl.sum(chosen.to(tl.int32), axis=0)

    if CONFIG.LISTS:
        n_extras = n_pairs // longest
        rank = row
        if BINS > 1:
            other = tl.arange(0, BINS)
            ahead = (lengths > length) | ((lengths == length) & (other < row))
            rank = tl.sum((ahead & (other < n_rows)).to(tl.int32), axis=0)
        work = inverse.work + graph * (n_extras + n_rows) * 4
        last_lot = tl.where(row == n_rows - 1, n_extras, (start + length) // longest)
        _cut_row(work, n_extras + rank, row, start, length, longest, last_lot, BLOCK)
        # The threads of this program read, below, pairs that other threads of it have written.
        tl.debug_barrier()
        for step in tl.range(0, length, CONFIG.BLOCK_ENTRIES):
            index = step + tl.arange(0, CONFIG.BLOCK_ENTRIES)
            live = index < length
            pair = tl.load(inverse.pairs + graph * n_pairs + start + index, mask=live, other=0)
            factor = None
            if lists.factors is not None:
                factor = tl.load(r_weight + graph * n_pairs + pair, mask=live, other=0.0)
            list_regions(
                lists.token_list,
                lists.factors,
                graph * n_pairs + start + index,
                pair // topk,
                factor,
                live,
                sizes,
                CONFIG.BLOCK_TOKENS,
            )


@triton.jit
def _cut_row(work, place, region, start, length, longest, last_lot, BLOCK: tl.constexpr):
    """Cuts one region's row into pieces of at most `longest` pairs.

    The first piece goes to `place` in `work`. The further pieces, which come from the longest rows, go to the
    front of `work`, into the extra places. Each row finds its extra places without reading other rows: if all
    pairs are divided into lots of `longest` pairs, a row that starts in lot `a` and ends in lot `b` has at
    most `b - a` further pieces, and the extra places `a` to `b - 1` are its own. `last_lot` is `b`; for the
    last row it is the number of all extra places. Unused extra places get region -1. Of the 2 * extras
    partial sums, those from `2 * a` on are the row's own, likewise. A row of one piece has partial sum -1.
    """
    pieces = tl.maximum((length + longest - 1) // longest, 1)
    first_lot = start // longest
    is_cut = pieces > 1
    tl.store(work + place * 4, region)
    tl.store(work + place * 4 + 1, start)
    tl.store(work + place * 4 + 2, start + tl.minimum(length, longest))
    tl.store(work + place * 4 + 3, tl.where(is_cut, 2 * first_lot, -1))
    for first in tl.range(first_lot, last_lot, BLOCK):
        lot = first + tl.arange(0, BLOCK)
        own = lot < last_lot
        piece = lot - first_lot + 1
        at = work + lot * 4
        piece_start = start + piece * longest
        tl.store(at, tl.where(piece < pieces, region, -1), mask=own)
        tl.store(at + 1, piece_start, mask=own)
        tl.store(at + 2, tl.minimum(piece_start + longest, start + length), mask=own)
        tl.store(at + 3, 2 * first_lot + piece, mask=own)
