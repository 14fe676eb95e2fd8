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
from ..lib.exponential import LOWEST
from .graph import MARKED, list_regions, mark_tokens

_HIGHEST = tl.constexpr(-LOWEST.value)


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
def ranked(logits):
    """Numbers to compare logits by: NaN comes before +inf, as torch.sort has it, and that before all others.

    Above all NaN must not yield an index out of range: a model whose training diverges should report a NaN
    loss, not an illegal memory access. So NaN becomes +inf, and infinities the finite numbers next to them:
    minus infinity stands for what cannot be chosen.
    """
    return tl.where(logits == logits, tl.minimum(tl.maximum(logits, LOWEST), _HIGHEST), float("inf"))


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
    logits = ranked(logits)
    free = key_region < n_regions
    slot = tl.arange(0, BLOCK_K)[None, :]
    top_logits = tl.full([BLOCK_Q, BLOCK_K], float("-inf"), tl.float32)
    top_regions = tl.zeros([BLOCK_Q, BLOCK_K], tl.int32)
    for taken in tl.range(0, topk):
        # One reduction for the logit and its region: a row's logits lie in several warps, which have to meet
        # for each. Of equal logits it takes the first.
        largest, winner = tl.max(tl.where(free, logits, float("-inf")), axis=1, return_indices=True)
        free = free & (key_region != winner[:, None])
        top_logits = tl.where(slot == taken, largest[:, None], top_logits)
        top_regions = tl.where(slot == taken, winner[:, None], top_regions)

    # What was infinite or NaN makes all weights of its row NaN, as a softmax does.
    top_logits = tl.where(top_logits == _HIGHEST, float("inf"), top_logits)
    top_logits = tl.where(top_logits == LOWEST, float("-inf"), top_logits)
    weight = tl.exp(top_logits - tl.max(top_logits, axis=1)[:, None])
    weight = weight / tl.sum(weight, axis=1)[:, None]
    place = (image * n_regions + query_region[:, None]) * topk + slot
    stored = exists[:, None] & (slot < topk)
    if r_weight is not None:
        tl.store(r_weight + place, weight, mask=stored)
    tl.store(r_idx + place, top_regions, mask=stored)
    if marks is not None:
        own_marks = tl.where(free, -MARKED, 0.0).to(tl.bfloat16)
        at = (image * n_regions + query_region[:, None]) * BLOCK_R + key_region
        tl.store(marks.query_marks + at, own_marks, mask=exists[:, None])
        if image == 0:
            region_tokens = region_height * region_width
            first = tl.program_id(1) * BLOCK_Q * region_tokens
            last = tl.minimum(first + BLOCK_Q * region_tokens, n_regions * region_tokens)
            for start in tl.range(first, last, CONFIG.BLOCK_MARKED):
                row = start + tl.arange(0, CONFIG.BLOCK_MARKED)
                mark_tokens(marks, row, last, region_tokens, last, region_tokens, BLOCK_R)
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
