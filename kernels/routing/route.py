"""Region-level routing: means of the regions' queries and keys, then logits and top-k in one pass.

| array | shape | meaning |
|---|---|---|
| qkv | (N, H, W, PACKED) | packed projection |
| padding | (PACKED,) | what tokens past the map's edge hold; None to leave them out |
| means | (N, P, MEAN_DIM) fp32 | region queries, then region keys |
| query, key | (N, P, DIM) fp32 | region queries and keys, rows ROW_STRIDE apart |
| r_weight | (N, P, TOPK) fp32 | softmax over the chosen logits, descending |
| r_idx | (N, P, TOPK) int32 | chosen regions, by descending logit, equal ones by ascending index |
| lists | | tokens of the chosen regions, see `attention.arguments.Lists`; None where they are listed apart |
| marks | | the choice as a mask, see `arguments.Marks`; None but for masked attention |
"""

import triton
import triton.language as tl

from ..lib.addressing import token_of
from .graph import MARKED, list_regions, mark_tokens

# In the order of logits: NaN, the highest, and what is below all logits.
_NAN = tl.constexpr(0x7FC00000)
_NONE = tl.constexpr(-(2**31))


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
    """Means over a region's tokens of BLOCK_C of the first MEAN_DIM packed channels; grid (N*P, blocks)."""
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
    # The loads of two steps are in flight: on an H100 that made the means of small regions faster, and those
    # of large ones no slower, while four steps made these slower (`bra-bench kernel-times`).
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
    """Integers that compare as the logits do: NaN before +inf, as torch.sort has it, and -0 equal to 0.

    Above all NaN must not yield an index out of range: a model whose training diverges should report a NaN
    loss, not an illegal memory access.
    """
    bits = tl.where(logits == logits, (logits + 0.0).to(tl.int32, bitcast=True), _NAN)
    return _from_sign(bits)


@triton.jit
def _from_sign(bits):
    """Turns the bits of floats into integers of their order, and back: negative floats are reversed."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _take_largest(order, column, topk, BLOCK_K: tl.constexpr):
    """The `topk` largest numbers of every row, descending, of equal ones the first.

    Integers, since NVIDIA's GPUs find the largest of a warp's in one instruction, of floats by exchanges.

    Args:
        order: (rows, columns) int32; _NONE for what must not be taken.
        column: (rows, columns), the number of each column.
        topk: how many; a row must have as many.
        BLOCK_K: `topk` or more.

    Returns:
        Numbers and columns, (rows, BLOCK_K), and `order` with _NONE in the place of what was taken.
    """
    ROWS: tl.constexpr = order.shape[0]
    slot = tl.arange(0, BLOCK_K)[None, :]
    largest = tl.full([ROWS, BLOCK_K], _NONE, tl.int32)
    columns = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for taken in tl.range(0, topk):
        best = tl.max(order, axis=1)[:, None]
        first = tl.min(tl.where(order == best, column, order.shape[1]), axis=1)[:, None]
        order = tl.where(column == first, _NONE, order)
        largest = tl.where(slot == taken, best, largest)
        columns = tl.where(slot == taken, first, columns)
    return largest, columns, order


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
    """Logits of BLOCK_Q query regions against all key regions, and each one's topk largest; grid (N, blocks).

    Several query regions share the keys that they load, and are as many as a matrix unit takes. What the
    attention walks, tokens of the chosen regions or marks, is written at once, which spares launches.
    """
    DIM: tl.constexpr = CONFIG.DIM
    ROW_STRIDE: tl.constexpr = CONFIG.ROW_STRIDE
    BLOCK_Q: tl.constexpr = CONFIG.BLOCK_Q
    BLOCK_R: tl.constexpr = CONFIG.BLOCK_R
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    image = tl.program_id(0).to(tl.int64)
    query_region = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key_region = tl.zeros([BLOCK_Q, 1], tl.int32) + tl.arange(0, BLOCK_R)[None, :]
    exists = query_region < n_regions
    query_rows = query + (image * n_regions + query_region[:, None]) * ROW_STRIDE
    key_rows = key + (image * n_regions + tl.arange(0, BLOCK_R)[:, None]) * ROW_STRIDE

    logits = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    for start in tl.range(0, DIM, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None, :]
        of_queries = tl.load(query_rows + channel, mask=exists[:, None] & (channel < DIM), other=0.0) * scale
        key_mask = (tl.arange(0, BLOCK_R) < n_regions)[:, None] & (channel < DIM)
        of_keys = tl.load(key_rows + channel, mask=key_mask, other=0.0)
        if BLOCK_Q == 1:  # for many regions: operands of a product would not fit shared memory
            logits += tl.sum(of_keys * of_queries, axis=1)[None, :]
        else:
            logits = tl.dot(of_queries, tl.trans(of_keys), logits, input_precision=CONFIG.PRECISION)
    order = in_order(logits)
    if BLOCK_Q > 1:
        # Changes nothing but where the numbers lie: for a gather Triton puts each row into one warp. After
        # the product a row lies in all warps, which would have to meet for each of the topk, twice.
        order = tl.gather(order, key_region, 1)
    order = tl.where(key_region < n_regions, order, _NONE)
    top, top_regions, order = _take_largest(order, key_region, topk, BLOCK_K)
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
        at = (image * n_regions + query_region[:, None]) * BLOCK_R + key_region
        tl.store(marks.query_marks + at, own_marks, mask=exists[:, None])
        # By programs of many images: those of one would take as long for it as for all else.
        region_tokens = region_height * region_width
        n_tokens = n_regions * region_tokens
        n_images = tl.minimum(tl.num_programs(0), n_tokens)
        if image < n_images:
            BLOCK: tl.constexpr = CONFIG.BLOCK_MARKED
            program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            for start in tl.range(program * BLOCK, n_tokens, n_images * tl.num_programs(1) * BLOCK):
                row = start + tl.arange(0, BLOCK)
                mark_tokens(marks, row, n_tokens, region_tokens, n_tokens, region_tokens, BLOCK_R)
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
