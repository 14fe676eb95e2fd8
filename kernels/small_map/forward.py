"""Forward of a small map: one program per region and group of heads chooses regions and attends to them.

The list of keys, the logits of the regions and their choice stay in registers. On maps of a few hundred
tokens a launch costs as much as the attention, so routing shares the attention's launch. A tile of 64 rows
would be mostly empty, so the tile has the rows of one region, and the program computes one batched product of
all its heads, in which each warp has the product of one head.

| array | shape | meaning |
|---|---|---|
| maps, padding, results | | as in `attention.forward` |
| rows | | region queries and keys, see `RegionRows`; None if `route_kernel` has chosen already |
| choices | | where the choice goes or, if `rows` is None, from where it is read, see `Choices` |
| lepe | | values, weight, fill and bias, see `LepeParts` |
"""

import triton
import triton.language as tl

from ..lepe.convolution import convolve_tile
from ..lib.exponential import LOWEST
from ..lib.matrix import add_matmul, matmul
from ..routing.route import in_order
from .tokens import (
    chosen,
    keys_of,
    listed_tokens,
    load_keys_values,
    load_queries,
    locate,
    own_tokens,
    transposed,
)


@triton.jit
def _choose(rows, choices, image, region, stores, topk, n_regions, scale, CONFIG: tl.constexpr):
    """The `topk` regions with the largest logits, and their routing weights: (BLOCK_K,) each, largest first.

    If `stores`, they are also written to `choices`. A region's place is the number of regions ahead of it:
    those with a larger logit, or with an equal logit and a smaller number.
    """
    BLOCK_P: tl.constexpr = CONFIG.BLOCK_P
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    DIM: tl.constexpr = CONFIG.ROUTING_DIM  # Triton 3.4 needs a plain name as the limit of a static range
    key_region = tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    exists = key_region < n_regions
    query_row = rows.query + (image * n_regions + region) * CONFIG.ROUTING_STRIDE
    key_rows = rows.key + (image * n_regions + key_region[:, None]) * CONFIG.ROUTING_STRIDE
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.static_range(0, DIM, BLOCK_C):
        live = start + channel < DIM
        of_query = tl.load(query_row + start + channel, mask=live, other=0.0) * scale
        key_mask = exists[:, None] & live[None, :]
        products += tl.load(key_rows + start + channel[None, :], mask=key_mask, other=0.0) * of_query[None, :]
    logits = tl.sum(products, axis=1)
    logits = tl.where(exists, logits, float("-inf"))
    rank = in_order(logits)
    others = tl.reshape(rank, [BLOCK_P, 1])
    ahead = (others > rank[None, :]) | (
        (others == rank[None, :]) & (key_region[:, None] < key_region[None, :])
    )
    place = tl.sum(ahead.to(tl.int32), axis=0)

    weight = tl.where(place < topk, tl.exp(logits - tl.max(logits, axis=0)), 0.0)
    weight = weight / tl.sum(weight, axis=0)
    slots = (image * n_regions + region) * topk + place
    chosen = (place < topk) & stores
    if choices.r_idx is not None:
        tl.store(choices.r_idx + slots, key_region, mask=chosen)
    if choices.r_weight is not None:
        tl.store(choices.r_weight + slots, weight, mask=chosen)
    slot = tl.arange(0, CONFIG.BLOCK_K)
    in_slot = place[:, None] == slot[None, :]
    regions = tl.sum(tl.where(in_slot, key_region[:, None], 0), axis=0)
    return regions, tl.sum(tl.where(in_slot, weight[:, None], 0.0), axis=0)


@triton.jit(
    do_not_specialize=[
        *("topk", "n_regions", "region_height", "region_width", "columns", "height", "width"),
        *("kv_region_height", "kv_region_width", "kv_height", "kv_width"),
        *("of_tokens", "of_width", "of_kv_tokens", "of_kv_width", "of_columns"),
    ]
)
def small_map_forward_kernel(
    maps,
    rows,
    choices,
    padding,
    lepe,
    results,
    logit_scale,
    routing_scale,
    topk,
    n_regions,
    region_height,
    region_width,
    columns,
    height,
    width,
    kv_region_height,
    kv_region_width,
    kv_height,
    kv_width,
    of_tokens,
    of_width,
    of_kv_tokens,
    of_kv_width,
    of_columns,
    CONFIG: tl.constexpr,
):
    """Output and lse of the tokens of one region, for HEADS heads; `of_...` are inverses, see `tokens`."""
    HEADS: tl.constexpr = CONFIG.HEADS
    BLOCK_OWN: tl.constexpr = CONFIG.BLOCK_OWN
    BLOCK_V: tl.constexpr = CONFIG.BLOCK_V
    DIM: tl.constexpr = CONFIG.NUM_HEADS * CONFIG.V_HEAD_DIM
    PRECISION: tl.constexpr = CONFIG.PRECISION
    image, region, first_head = locate(tl.program_id(0), n_regions, CONFIG)
    head = first_head + tl.arange(0, HEADS)
    grid = (region_height, region_width, columns, height, width, of_tokens, of_width, of_columns)
    kv_grid = (
        kv_region_height,
        kv_region_width,
        columns,
        kv_height,
        kv_width,
        of_kv_tokens,
        of_kv_width,
        of_columns,
    )
    own, _ = own_tokens(region, grid, BLOCK_OWN)
    in_map = own >= 0
    q = load_queries(maps, image, height * width, own, in_map, head, CONFIG)
    if rows is None:
        regions, weight = chosen(choices, image, region, topk, n_regions, CONFIG)
    else:
        regions, weight = _choose(
            rows, choices, image, region, first_head == 0, topk, n_regions, routing_scale, CONFIG
        )

    # LOWEST, not minus infinity: see the docstring of `attention.forward`.
    row_max = tl.full([HEADS, BLOCK_OWN], LOWEST, tl.float32)
    row_sum = tl.zeros([HEADS, BLOCK_OWN], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_OWN, BLOCK_V], tl.float32)
    for start in tl.range(0, keys_of(region, topk, grid, kv_grid, CONFIG), CONFIG.BLOCK_STEP):
        token, live, slot = listed_tokens(regions, topk, start, kv_grid, CONFIG.BLOCK_STEP)
        k, v = load_keys_values(maps, padding, image, kv_height * kv_width, token, live, head, CONFIG)
        scores = matmul(q, transposed(k), PRECISION) * logit_scale
        if CONFIG.IS_SOFT:
            factor = tl.gather(weight, slot, 0)[None, None, :]
            scores *= factor
        scores = tl.where(live[None, None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=2))
        probs = tl.exp2(scores - new_max[:, :, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, axis=2)
        if CONFIG.IS_SOFT:
            probs *= factor
        acc = add_matmul(acc * rescale[:, :, None], probs, v, PRECISION)
        row_max = new_max
    acc *= (1 / row_sum)[:, :, None]

    # Put the channels of the heads side by side: rows are then stored in longer pieces, and `convolve_tile`
    # takes (tokens, channels).
    beside = tl.reshape(tl.permute(acc, (1, 0, 2)), (BLOCK_OWN, HEADS * BLOCK_V))
    index = tl.arange(0, HEADS * BLOCK_V)
    channel = (first_head + index // BLOCK_V) * CONFIG.V_HEAD_DIM + index % BLOCK_V
    channel_live = index % BLOCK_V < CONFIG.V_HEAD_DIM
    places = (image * (height * width) + own)[:, None] * DIM + channel[None, :]
    mask = in_map[:, None] & channel_live[None, :]
    if results.attention is not None:
        tl.store(results.attention + places, beside.to(results.attention.dtype.element_ty), mask=mask)
    if CONFIG.LEPE_KERNEL > 0:
        row = own // width
        beside += convolve_tile(
            lepe,
            image * (height * width) * CONFIG.LEPE_STRIDE,
            row,
            own - row * width,
            (height, width, n_regions // columns * region_height, columns * region_width),
            channel,
            in_map,
            channel_live,
            CONFIG.LEPE_STRIDE,
            CONFIG.LEPE_KERNEL,
        )
    tl.store(results.out + places, beside.to(results.out.dtype.element_ty), mask=mask)
    if results.lse is not None:
        lse_rows = results.lse + (image * CONFIG.NUM_HEADS + head[:, None]) * (height * width)
        tl.store(lse_rows + own[None, :], row_max + tl.log2(row_sum), mask=in_map[None, :])
