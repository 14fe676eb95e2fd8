"""Lists of tokens, and the inverse of the routing graph: everything the attention kernels walk.

A "graph" is one image's, or one head's of an image (`G` an image). A "pair" is one choice, numbered
`query_region * TOPK + slot`; every graph has exactly `P * TOPK`, so all shapes are static.

| array | shape | meaning |
|---|---|---|
| r_idx | (N, G, P, TOPK) int32 | key regions that each query region chose |
| tokens | (entries, S) int32 | tokens of the listed regions; -1 is padding |
| region_list | (regions, S) int32 | tokens of all regions in order |
| factors | (entries, S) fp32 | factor of each listed token's region |
| marks | | tables of masked attention, see `Marks` |
| row_start | (N, G, P_kv + 1) int32 | where each key region's row starts in `pairs` |
| pairs | (N, G, P * TOPK) int32 | the inverse graph: pairs by key region, ascending in each row |
| work | (N, G, P_kv + extras, 4) int32 | pieces of rows: region (-1: none), first and last pair, partial |
"""

import triton
import triton.language as tl

from ..lib.addressing import token_of


@triton.jit(
    do_not_specialize=[
        *("n_entries", "n_pairs", "topk", "region_height", "region_width", "columns", "height", "width"),
        "n_regions",
    ]
)
def list_tokens_kernel(
    entries,
    entry_factor,
    tokens,
    region_list,
    factors,
    n_entries,
    n_pairs,
    topk,
    region_height,
    region_width,
    columns,
    height,
    width,
    n_regions,
    CONFIG: tl.constexpr,
):
    """Expands BLOCK_ENTRIES entries into their regions' tokens; after the last entry, all regions in order.

    An entry is a region (FROM_PAIRS false) or a pair, whose query region it stands for. `entry_factor` holds
    the factor of every pair; entries that are no pairs stand in the order of pairs. None writes no factors.
    """
    FROM_PAIRS: tl.constexpr = CONFIG.FROM_PAIRS
    BLOCK_ENTRIES: tl.constexpr = CONFIG.BLOCK_ENTRIES
    BLOCK_TOKENS: tl.constexpr = CONFIG.BLOCK_TOKENS
    region_tokens = region_height * region_width
    place = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    listed = place < n_entries
    other_region = place - n_entries
    entry = tl.load(entries + place, mask=listed, other=0)
    region = tl.where(listed, entry // topk if FROM_PAIRS else entry, other_region.to(tl.int32))
    if entry_factor is not None:
        graph_start = place // n_pairs * n_pairs
        factor = tl.load(
            entry_factor + (graph_start + entry if FROM_PAIRS else place), mask=listed, other=0.0
        )
    for start in tl.range(0, region_tokens, BLOCK_TOKENS):
        index = start + tl.arange(0, BLOCK_TOKENS)[None, :]
        in_region = index < region_tokens
        token = token_of(region[:, None], index, region_height, region_width, columns, height, width)
        at = place[:, None] * region_tokens + index
        tl.store(tokens + at, token, mask=listed[:, None] & in_region)
        if entry_factor is not None:
            spread = factor[:, None] + tl.zeros([1, BLOCK_TOKENS], tl.float32)
            tl.store(factors + at, spread, mask=listed[:, None] & in_region)
        at = other_region[:, None] * region_tokens + index
        is_other = ~listed & (other_region < n_regions)
        tl.store(region_list + at, token, mask=is_other[:, None] & in_region)


@triton.jit(do_not_specialize=["n_rows", "topk", "n_queries", "region_tokens", "n_keys", "kv_region_tokens"])
def mark_choices_kernel(
    r_idx,
    marks,
    n_rows,
    topk,
    n_queries,
    region_tokens,
    n_keys,
    kv_region_tokens,
    CONFIG: tl.constexpr,
):
    """Tables for masked attention; each program writes BLOCK_ROWS rows of all three.

    The product of a query's and a key's marks is 0 where the query's region chose the key's, else -2**30,
    exact in half precision: a mask that the matrix unit adds to the scores, at no instruction a score.
    """
    BLOCK_ROWS: tl.constexpr = CONFIG.BLOCK_ROWS
    BLOCK_MARKS: tl.constexpr = CONFIG.BLOCK_MARKS
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    region = tl.arange(0, BLOCK_MARKS)[None, :]
    row_marks = tl.full([BLOCK_ROWS, BLOCK_MARKS], -32768.0, tl.float16)
    for slot in tl.range(0, topk):
        choice = tl.load(r_idx + row.to(tl.int64) * topk + slot, mask=row < n_rows, other=-1)
        row_marks = tl.where(choice[:, None] == region, 0.0, row_marks).to(tl.float16)
    at = row.to(tl.int64)[:, None] * BLOCK_MARKS + region
    tl.store(marks.query_marks + at, row_marks, mask=(row < n_rows)[:, None])
    tl.store(marks.query_regions + row, row // region_tokens, mask=row < n_queries)
    own = tl.where((row // kv_region_tokens)[:, None] == region, 32768.0, 0.0).to(tl.float16)
    tl.store(marks.key_marks + at, own, mask=(row < n_keys)[:, None])


@triton.jit(do_not_specialize=["n_pairs", "n_regions"])
def invert_graph_kernel(r_idx, row_start, pairs, n_pairs, n_regions, CONFIG: tl.constexpr):
    """Row of one key region: who chose it, ascending, and where the row starts; grid (N * G * P_kv,).

    A stable counting sort without atomics: every program counts the choices of smaller regions to find its
    row's start, then writes its own in order. All programs of a graph read 2 * P_kv * P * TOPK numbers: 19
    thousand at 49 regions and topk 4, a billion at 4096 regions and topk 32, where a sort would be due.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    region = tl.program_id(0) % n_regions
    graph = (tl.program_id(0) // n_regions).to(tl.int64)
    choices = r_idx + graph * n_pairs
    start = 0
    for first in tl.range(0, n_pairs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        choice = tl.load(choices + index, mask=index < n_pairs, other=n_regions)
        start += tl.sum((choice < region).to(tl.int32), axis=0)
    tl.store(row_start + graph * (n_regions + 1) + region, start)
    if region == n_regions - 1:
        tl.store(row_start + graph * (n_regions + 1) + n_regions, n_pairs)

    next_free = pairs + graph * n_pairs + start
    for first in tl.range(0, n_pairs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        choice = tl.load(choices + index, mask=index < n_pairs, other=n_regions)
        chosen = (choice == region).to(tl.int32)
        tl.store(next_free + tl.cumsum(chosen, axis=0) - 1, index, mask=chosen != 0)
        next_free += tl.sum(chosen, axis=0)


@triton.jit(do_not_specialize=["n_regions", "n_extras", "longest"])
def cut_rows_kernel(row_start, work, n_regions, n_extras, longest, CONFIG: tl.constexpr):
    """Cuts one graph's rows into pieces of at most `longest` pairs; grid (N * G,).

    The first piece of every row stands at its region's number, further ones behind, in order; a row of one
    piece has partial -1, the pieces of a longer one number the partial sums that they write.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    graph = tl.program_id(0).to(tl.int64)
    graph_work = work + graph * (n_regions + n_extras) * 4
    used_extras, used_partials = 0, 0
    for block in tl.range(0, n_regions, BLOCK):
        region = block + tl.arange(0, BLOCK)
        exists = region < n_regions
        starts = row_start + graph * (n_regions + 1) + region
        first = tl.load(starts, mask=exists, other=0)
        last = tl.load(starts + 1, mask=exists, other=0)
        pieces = tl.maximum((last - first + longest - 1) // longest, 1)
        partials = tl.where(pieces > 1, pieces, 0)
        partial = tl.where(pieces > 1, used_partials + tl.cumsum(partials, axis=0) - partials, -1)
        extra = n_regions + used_extras + tl.cumsum(pieces - 1, axis=0) - pieces
        for piece in tl.range(0, tl.max(pieces, axis=0)):
            start = first + piece * longest
            at = graph_work + tl.where(piece == 0, region, extra + piece) * 4
            live = exists & (piece < pieces)
            tl.store(at, region, mask=live)
            tl.store(at + 1, start, mask=live)
            tl.store(at + 2, tl.minimum(start + longest, last), mask=live)
            tl.store(at + 3, tl.where(partial < 0, -1, partial + piece), mask=live)
        used_extras += tl.sum(pieces - 1, axis=0)
        used_partials += tl.sum(partials, axis=0)
    for unused in tl.range(used_extras, n_extras, BLOCK):
        index = unused + tl.arange(0, BLOCK)
        tl.store(graph_work + (n_regions + index) * 4, -1, mask=index < n_extras)
