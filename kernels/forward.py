"""Forward: token-to-token attention over the routed regions, keys and values read in place.

One program computes BLOCK_M queries of one region and head against the `TOPK * S` keys of the regions that
the region chose, with the online softmax of FlashAttention-2.

| array | shape | meaning |
|---|---|---|
| qkv | (N, H, W, 2*QK_DIM + DIM) | packed projection: queries, keys, values |
| r_idx | (N, P, TOPK) int32 | regions that each region chose |
| out | (N, H, W, DIM) | attention output |
| lse | (N, NUM_HEADS, P, S) fp32 | log2 of the softmax's denominator, of base-2 logits |
"""

import triton
import triton.language as tl

from .addressing import advance, list_position, load_rows, locate_program, token_of, tokens_of_tile
from .matrix import add_matmul, matmul


@triton.jit
def _attend_tile(
    acc, row_max, row_sum, query, key, value, live, logit_scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax: BLOCK_M queries against BLOCK_N keys."""
    scores = matmul(query, tl.trans(key), PRECISION)
    if MASKED:
        scores = tl.where(live[None, :], scores, float("-inf"))
    # The scale is positive, so it may be applied to the maximum and inside the exponent: one
    # multiply-add a score instead of a multiplication and a subtraction.
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * logit_scale)
    probs = tl.exp2(scores * logit_scale - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    acc = add_matmul(acc * rescale[:, None], probs, value, PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["region_height", "region_width"])
def attention_forward(
    qkv,
    r_idx,
    out,
    lse,
    logit_scale,
    region_height,
    region_width,
    N_WIN: tl.constexpr,
    TOPK: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and lse of BLOCK_M queries of one region and head."""
    QK_DIM: tl.constexpr = NUM_HEADS * QK_HEAD_DIM
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    PACKED: tl.constexpr = 2 * QK_DIM + DIM
    N_REGIONS: tl.constexpr = N_WIN * N_WIN

    region_tokens = region_height * region_width
    image, region, tile, head = locate_program(tl.cdiv(region_tokens, BLOCK_M), NUM_HEADS, N_REGIONS)
    map_start = image * N_REGIONS * region_tokens

    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    in_region, query_live, query_token = tokens_of_tile(
        tile, region, region_height, region_width, N_WIN, BLOCK_M
    )
    query_base = qkv + map_start * PACKED + head * QK_HEAD_DIM
    query = load_rows(query_base, query_token, qk_channel, query_live, PACKED, QK_HEAD_DIM, True)

    key_base = qkv + map_start * PACKED + QK_DIM + head * QK_HEAD_DIM
    value_base = qkv + map_start * PACKED + 2 * QK_DIM + head * V_HEAD_DIM
    chosen = r_idx + (image * N_REGIONS + region) * TOPK
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    slot, row, column = list_position(tl.arange(0, BLOCK_N), region_height, region_width)
    slot_step, row_step, column_step = list_position(BLOCK_N, region_height, region_width)
    # Full tiles carry no key mask; the rest of the list is peeled off as one masked tile.
    list_length = TOPK * region_tokens
    full = list_length - list_length % BLOCK_N
    for _ in tl.range(0, full, BLOCK_N):
        token = token_of(tl.load(chosen + slot), row, column, region_height, region_width, N_WIN)
        key = load_rows(key_base, token, qk_channel, None, PACKED, QK_HEAD_DIM, False)
        value = load_rows(value_base, token, v_channel, None, PACKED, V_HEAD_DIM, False)
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, key, value, None, logit_scale, False, PRECISION
        )
        slot, row, column = advance(
            slot, row, column, slot_step, row_step, column_step, region_height, region_width
        )
    if full < list_length:
        live = full + tl.arange(0, BLOCK_N) < list_length
        chosen_region = tl.load(chosen + slot, mask=live, other=0)
        token = token_of(chosen_region, row, column, region_height, region_width, N_WIN)
        key = load_rows(key_base, token, qk_channel, live, PACKED, QK_HEAD_DIM, True)
        value = load_rows(value_base, token, v_channel, live, PACKED, V_HEAD_DIM, True)
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, key, value, live, logit_scale, True, PRECISION
        )

    acc = acc / row_sum[:, None]
    tl.store(
        out + map_start * DIM + head * V_HEAD_DIM + query_token[:, None] * DIM + v_channel[None, :],
        acc.to(out.dtype.element_ty),
        mask=query_live[:, None] & (v_channel < V_HEAD_DIM)[None, :],
    )
    lse_start = (image * NUM_HEADS + head) * N_REGIONS * region_tokens + region * region_tokens
    tl.store(lse + lse_start + in_region, row_max + tl.log2(row_sum), mask=query_live)
