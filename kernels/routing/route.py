"""Region-level routing: means of the regions' queries and keys, then logits and top-k in one pass.

| array | shape | meaning |
|---|---|---|
| qkv | (N, H, W, PACKED) | packed projection |
| padding | (PACKED,) | what tokens past the map's edge hold; None to leave them out |
| means | (N, P, MEAN_DIM) fp32 | region queries, then region keys |
| query, key | (N, P, DIM) fp32 | region queries and keys, rows ROW_STRIDE apart |
| r_weight | (N, P, TOPK) fp32 | softmax over the chosen logits, descending |
| r_idx | (N, P, TOPK) int32 | chosen regions, by descending logit, equal ones by ascending index |
| lists | | tokens of the chosen regions, see `arguments.Lists`; None if another kernel lists them |
| marks | | the choice as a mask, see `arguments.Marks`; None except for masked attention |
"""

import triton
import triton.language as tl

from ..lib.addressing import token_of
from .graph import MARKED, list_regions, mark_tokens

# Integers in the order of logits, see `in_order`: NaN, the highest; below all logits; above all logits.
_NAN = tl.constexpr(0x7FC00000)
_NONE, _ABOVE = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["region_height", "region_width", "columns", "height", "width", "n_regions"])
def region_means_kernel(
    qkv,
    padding,
    means,
    region_height,
    region_width,
    columns,
    height,
    width,
    n_regions,
    CONFIG: tl.constexpr,
):
    """Means of BLOCK_C of the first MEAN_DIM channels over a region's tokens; grid (N*P, channel blocks)."""
    MEAN_DIM: tl.constexpr = CONFIG.MEAN_DIM
    PACKED: tl.constexpr = CONFIG.PACKED
    BLOCK_TOKENS: tl.constexpr = CONFIG.BLOCK_TOKENS
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    region_tokens = region_height * region_width
    region = tl.program_id(0) % n_regions
    image = (tl.program_id(0) // n_regions).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_live = channel < MEAN_DIM
    base = qkv + image * height * width * PACKED + channel[None, :]

    total = tl.zeros([BLOCK_TOKENS, BLOCK_C], tl.float32)
    n_counted = tl.zeros([BLOCK_TOKENS], tl.int32)
    # Unrolled so that the loads of two steps are in flight at once. On an H100 this made the means of small
    # regions faster and those of large regions no slower; four steps made those of large regions slower
    # (`bra-bench kernel-times`).
    for start in tl.range(0, region_tokens, BLOCK_TOKENS, loop_unroll_factor=2):
        index = start + tl.arange(0, BLOCK_TOKENS)
        token = token_of(region, index, region_height, region_width, columns, height, width)
        rows = base + token.to(tl.int64)[:, None] * PACKED
        counted = index < region_tokens
        if padding is None:
            counted = counted & (token >= 0)
        else:
            rows = tl.where((token >= 0)[:, None], rows, padding + channel[None, :])
        total += tl.load(rows, mask=counted[:, None] & channel_live[None, :], other=0.0).to(tl.float32)
        n_counted += counted.to(tl.int32)
    mean = tl.sum(total, axis=0) / tl.sum(n_counted, axis=0)
    tl.store(means + (image * n_regions + region) * MEAN_DIM + channel, mean, mask=channel_live)


@triton.jit
def in_order(logits):
    """int32 numbers in the order of the logits; as in torch.sort, NaN is above +inf, and -0 equals 0.

    NaN needs a place in the order, so that it cannot lead to an index out of range: a model whose training
    diverges should report a NaN loss, not an illegal memory access.
    """
    bits = tl.where(logits == logits, (logits + 0.0).to(tl.int32, bitcast=True), _NAN)
    return _from_sign(bits)


@triton.jit
def _from_sign(bits):
    """Turns the bits of floats into int32 in their order, and back: flips 31 bits of negative numbers."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _each_row_in_a_warp(x):
    """`x`, (rows, columns), unchanged, but with each row in one warp: for a gather Triton moves it there.

    A matrix product leaves each row spread over all warps, which would have to synchronise to find its
    largest number.
    """
    column = tl.zeros([x.shape[0], 1], tl.int32) + tl.arange(0, x.shape[1])[None, :]
    return tl.gather(x, column, 1)


@triton.jit
def _take_largest(order, column, topk, BLOCK_K: tl.constexpr):
    """The `topk` largest numbers of every row, descending; equal numbers in the order of columns.

    The numbers are integers, because NVIDIA's GPUs find the largest integer of a warp with one instruction,
    but the largest float by several exchanges between threads.

    Args:
        order: (rows, columns) int32; _NONE where a number must not be taken.
        column: (rows, columns), the number of each column.
        topk: how many numbers to take; every row must have at least as many.
        BLOCK_K: `topk` or more.

    Returns:
        The numbers and their columns, both (rows, BLOCK_K), and `order` with _NONE where a number was taken.
    """
    ROWS: tl.constexpr = order.shape[0]
    slot = tl.arange(0, BLOCK_K)[None, :]
    largest = tl.full([ROWS, BLOCK_K], _NONE, tl.int32)
    columns = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for taken in tl.range(0, topk):
        best = tl.max(order, axis=1)[:, None]
        first = tl.min(tl.where(order == best, column, _ABOVE), axis=1)[:, None]
        order = tl.where(column == first, _NONE, order)
        largest = tl.where(slot == taken, best, largest)
        columns = tl.where(slot == taken, first, columns)
    return largest, columns, order


@triton.jit
def _keep_larger(kept, kept_columns, order, column, topk):
    """Replaces the smallest kept numbers by larger numbers of `order`; of equal numbers the kept one stays.

    Args:
        kept: (rows, slots) int32; _ABOVE in slots where no number may be kept.
        kept_columns: (rows, slots), the column of each kept number; all are different.
        order: (rows, columns) int32.
        column: (rows, columns), the number of each column, ascending, all larger than `kept_columns`.
        topk: how many numbers of every row are kept.

    Returns:
        `kept` and `kept_columns`, not sorted.
    """
    kept, kept_columns = _each_row_in_a_warp(kept), _each_row_in_a_warp(kept_columns)
    larger = (order > tl.min(kept, axis=1)[:, None]).to(tl.int32)
    for _ in tl.range(0, tl.minimum(tl.max(tl.sum(larger, axis=1), axis=0), topk)):
        best = tl.max(order, axis=1)[:, None]
        first = tl.min(tl.where(order == best, column, _ABOVE), axis=1)[:, None]
        order = tl.where(column == first, _NONE, order)
        least = tl.min(kept, axis=1)[:, None]
        last = tl.max(tl.where(kept == least, kept_columns, _NONE), axis=1)[:, None]
        exchanged = (kept_columns == last) & (best > least)
        kept = tl.where(exchanged, best, kept)
        kept_columns = tl.where(exchanged, first, kept_columns)
    return kept, kept_columns


@triton.jit
def _order_of_logits(query_rows, key_rows, exists, key_region, n_regions, scale, CONFIG: tl.constexpr):
    """Logits of BLOCK_Q query and BLOCK_R key regions, as `in_order` returns them, and their key regions."""
    DIM: tl.constexpr = CONFIG.DIM
    BLOCK_Q: tl.constexpr = CONFIG.BLOCK_Q
    BLOCK_R: tl.constexpr = CONFIG.BLOCK_R
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    logits = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    for start in tl.range(0, DIM, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None, :]
        of_queries = tl.load(query_rows + channel, mask=exists[:, None] & (channel < DIM), other=0.0) * scale
        key_mask = (key_region < n_regions)[:, None] & (channel < DIM)
        of_keys = tl.load(key_rows + channel, mask=key_mask, other=0.0)
        if BLOCK_Q == 1:
            logits += tl.sum(of_keys * of_queries, axis=1)[None, :]
        else:
            logits = tl.dot(of_queries, tl.trans(of_keys), logits, input_precision=CONFIG.PRECISION)
    order = in_order(logits)
    column = tl.zeros([BLOCK_Q, 1], tl.int32) + key_region[None, :]
    if BLOCK_Q > 1:
        order = _each_row_in_a_warp(order)
    return tl.where(column < n_regions, order, _NONE), column


@triton.jit
def _largest_of_blocks(query_rows, key_rows, exists, n_regions, topk, scale, CONFIG: tl.constexpr):
    """Like `_order_of_logits`, but only the `topk` largest of all key regions, not sorted, then _NONE."""
    BLOCK_Q: tl.constexpr = CONFIG.BLOCK_Q
    BLOCK_R: tl.constexpr = CONFIG.BLOCK_R
    SLOTS: tl.constexpr = CONFIG.BLOCK_K if CONFIG.BLOCK_K > 32 else 32  # at least one per thread of a warp
    slot = tl.zeros([BLOCK_Q, 1], tl.int32) + tl.arange(0, SLOTS)[None, :]
    kept = tl.where(slot < topk, _NONE, _ABOVE)
    regions = slot - SLOTS
    for first in tl.range(0, n_regions, BLOCK_R):
        key_region = first + tl.arange(0, BLOCK_R)
        order, column = _order_of_logits(query_rows, key_rows, exists, key_region, n_regions, scale, CONFIG)
        kept, regions = _keep_larger(kept, regions, order, column, topk)
        key_rows += BLOCK_R * CONFIG.ROW_STRIDE
    return tl.where(slot < topk, kept, _NONE), regions


@triton.jit(
    do_not_specialize=[
        *("n_regions", "topk", "region_height", "region_width", "columns", "height", "width"),
    ]
)
def route_kernel(
    query,
    key,
    r_weight,
    r_idx,
    lists,
    marks,
    scale,
    n_regions,
    topk,
    region_height,
    region_width,
    columns,
    height,
    width,
    CONFIG: tl.constexpr,
):
    """Chooses, for BLOCK_Q query regions, the `topk` key regions with the largest logits; grid (N, blocks).

    The query regions of a program share the keys that it loads; with 16 of them it uses the matrix units. If
    there are too many key regions for one product, it processes them IN_BLOCKS. The kernel also writes the
    tokens of the chosen regions, or the marks, for the attention; this saves launches.
    """
    ROW_STRIDE: tl.constexpr = CONFIG.ROW_STRIDE
    BLOCK_Q: tl.constexpr = CONFIG.BLOCK_Q
    BLOCK_R: tl.constexpr = CONFIG.BLOCK_R
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    image = tl.program_id(0).to(tl.int64)
    query_region = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key_region = tl.arange(0, BLOCK_R)
    exists = query_region < n_regions
    query_rows = query + (image * n_regions + query_region[:, None]) * ROW_STRIDE
    key_rows = key + (image * n_regions + key_region[:, None]) * ROW_STRIDE

    if CONFIG.IN_BLOCKS:
        order, column = _largest_of_blocks(query_rows, key_rows, exists, n_regions, topk, scale, CONFIG)
    else:
        order, column = _order_of_logits(query_rows, key_rows, exists, key_region, n_regions, scale, CONFIG)
    top, top_regions, order = _take_largest(order, column, topk, BLOCK_K)
    slot = tl.arange(0, BLOCK_K)[None, :]
    top_logits = tl.where(slot < topk, _from_sign(top).to(tl.float32, bitcast=True), float("-inf"))
    weight = tl.exp(top_logits - tl.max(top_logits, axis=1)[:, None])
    weight = weight / tl.sum(weight, axis=1)[:, None]
    place = (image * n_regions + query_region[:, None]) * topk + slot
    stored = exists[:, None] & (slot < topk)
    if r_weight is not None:
        tl.store(r_weight + place, weight, mask=stored)
    tl.store(r_idx + place, top_regions, mask=stored)
    if marks is not None:
        own_marks = tl.where(order == _NONE, 0.0, -MARKED).to(tl.bfloat16)
        at = (image * n_regions + query_region[:, None]) * BLOCK_R + key_region[None, :]
        tl.store(marks.query_marks + at, own_marks, mask=exists[:, None])
        # The marks of tokens are the same for all images, and the programs of many images write them
        # together. Those of a single image would take as long for this as for all the rest.
        region_tokens = region_height * region_width
        n_tokens = n_regions * region_tokens
        if CONFIG.LISTS:
            sizes = (1, region_tokens, 1, region_tokens)
        else:
            sizes = (region_height, region_width, columns, width)
        n_images = tl.minimum(tl.num_programs(0), n_tokens)
        if image < n_images:
            BLOCK: tl.constexpr = CONFIG.BLOCK_MARKED
            program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            for start in tl.range(program * BLOCK, n_tokens, n_images * tl.num_programs(1) * BLOCK):
                row = start + tl.arange(0, BLOCK)
                mark_tokens(marks, row, n_tokens, sizes, n_tokens, sizes, BLOCK_R)
    if CONFIG.LISTS:
        if lists.token_list is not None:
            ENTRIES: tl.constexpr = BLOCK_Q * BLOCK_K
            list_regions(
                lists.token_list,
                lists.factors,
                tl.reshape(place, [ENTRIES]),
                tl.reshape(top_regions, [ENTRIES]),
                tl.reshape(weight, [ENTRIES]),
                tl.reshape(stored, [ENTRIES]),
                (region_height, region_width, columns, height, width),
                CONFIG.BLOCK_TOKENS,
            )
        if image == 0:
            list_regions(
                lists.region_list,
                None,
                query_region,
                query_region,
                None,
                exists,
                (region_height, region_width, columns, height, width),
                CONFIG.BLOCK_REGION_TOKENS,
            )
