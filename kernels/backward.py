"""Backward: gradients of queries, keys and values, each written once by one owner, without atomics.

Probabilities are computed again from the saved `lse`, as in FlashAttention-2. With P the probabilities,
dP = dO V^T and delta = rowsum(dO * O): dS = P * (dP - delta), dQ = scale * dS K, dK = scale * dS^T Q,
dV = P^T dO.

| array | shape | meaning |
|---|---|---|
| qkv | (N, H, W, 2*QK_DIM + DIM) | packed projection: queries, keys, values |
| r_idx | (N, P, TOPK) int32 | regions that each region chose |
| out, grad_out | (N, H, W, DIM) | attention output and its gradient |
| lse | (N, NUM_HEADS, P, S) fp32 | from the forward |
| statistics | (N, NUM_HEADS, P, S, 2) fp32 | lse and delta, side by side; dQ writes them, dK/dV reads them |
| row_start | (N, P + 1) int32 | where each key region's row starts in `choosers` |
| choosers | (N, P * TOPK) int32 | query regions that chose the key region, ascending |
| grad_qkv | (N, H, W, 2*QK_DIM + DIM) | packed gradient; every element is written once |
"""

import triton
import triton.language as tl

from .addressing import advance, list_position, load_rows, locate_program, token_of, tokens_of_tile
from .matrix import add_matmul, matmul


@triton.jit
def _query_gradient_tile(
    grad_query,
    query,
    grad_out,
    lse,
    delta,
    key,
    value,
    live,
    logit_scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what BLOCK_N keys contribute to the (unscaled) gradient of BLOCK_M queries."""
    scores = matmul(query, tl.trans(key), PRECISION)
    probs = tl.exp2(scores * logit_scale - lse[:, None])
    if MASKED:
        # A dead key's row is 0, but so is its score, and exp2(0 - lse) may overflow where lse is far below 0.
        probs = tl.where(live[None, :], probs, 0.0)
    grad_probs = matmul(grad_out, tl.trans(value), PRECISION)
    grad_scores = probs * (grad_probs - delta[:, None])
    return add_matmul(grad_query, grad_scores, key, PRECISION)


@triton.jit(do_not_specialize=["region_height", "region_width"])
def query_gradient(
    qkv,
    r_idx,
    out,
    lse,
    grad_out,
    statistics,
    grad_qkv,
    logit_scale,
    scale,
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
    """dQ of BLOCK_M queries of one region and head; walks the keys as the forward does."""
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
    head_start = map_start * DIM + head * V_HEAD_DIM
    do = load_rows(grad_out + head_start, query_token, v_channel, query_live, DIM, V_HEAD_DIM, True)
    o = load_rows(out + head_start, query_token, v_channel, query_live, DIM, V_HEAD_DIM, True)
    row_start = (image * NUM_HEADS + head) * N_REGIONS * region_tokens + region * region_tokens
    row_lse = tl.load(lse + row_start + in_region, mask=query_live, other=float("inf"))
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    pair = statistics + (row_start + in_region) * 2
    tl.store(pair, row_lse, mask=query_live)
    tl.store(pair + 1, row_delta, mask=query_live)

    key_base = qkv + map_start * PACKED + QK_DIM + head * QK_HEAD_DIM
    value_base = qkv + map_start * PACKED + 2 * QK_DIM + head * V_HEAD_DIM
    chosen = r_idx + (image * N_REGIONS + region) * TOPK
    grad = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)

    slot, row, column = list_position(tl.arange(0, BLOCK_N), region_height, region_width)
    slot_step, row_step, column_step = list_position(BLOCK_N, region_height, region_width)
    list_length = TOPK * region_tokens
    full = list_length - list_length % BLOCK_N
    for _ in tl.range(0, full, BLOCK_N):
        token = token_of(tl.load(chosen + slot), row, column, region_height, region_width, N_WIN)
        key = load_rows(key_base, token, qk_channel, None, PACKED, QK_HEAD_DIM, False)
        value = load_rows(value_base, token, v_channel, None, PACKED, V_HEAD_DIM, False)
        grad = _query_gradient_tile(
            grad, query, do, row_lse, row_delta, key, value, None, logit_scale, False, PRECISION
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
        grad = _query_gradient_tile(
            grad, query, do, row_lse, row_delta, key, value, live, logit_scale, True, PRECISION
        )

    tl.store(
        grad_qkv
        + map_start * PACKED
        + head * QK_HEAD_DIM
        + query_token[:, None] * PACKED
        + qk_channel[None, :],
        (grad * scale).to(grad_qkv.dtype.element_ty),
        mask=query_live[:, None] & (qk_channel < QK_HEAD_DIM)[None, :],
    )


@triton.jit
def _load_statistics(statistics, query_index, live, MASKED: tl.constexpr):
    """lse and delta of the queries `query_index`.

    One load of pairs, not two of single numbers: the compiler repeats a load of fewer elements than there are
    threads in the layout of the products, all its address arithmetic included (measured at 128 keys x 64
    queries, 8 warps, head 32, sm_90: 236 integer instructions a step against 63).
    """
    pairs = statistics + query_index[:, None] * 2 + tl.arange(0, 2)[None, :]
    if MASKED:
        pair = tl.load(pairs, mask=live[:, None], other=0.0)
    else:
        pair = tl.load(pairs)
    return tl.split(pair)


@triton.jit
def _key_value_gradient_tile(
    grad_key, grad_value, key, value, query, grad_out, lse, delta, logit_scale, PRECISION: tl.constexpr
):
    """Adds what BLOCK_M queries contribute to the gradients of BLOCK_N keys and values.

    Everything is transposed, keys by queries, so that the accumulators stay in registers. A dead query needs
    no mask: its rows of query and gradient are 0, so it adds 0 whatever its probability, 2**0.
    """
    scores = matmul(key, tl.trans(query), PRECISION)
    probs = tl.exp2(scores * logit_scale - lse[None, :])
    grad_value = add_matmul(grad_value, probs, grad_out, PRECISION)
    grad_probs = matmul(value, tl.trans(grad_out), PRECISION)
    grad_scores = probs * (grad_probs - delta[None, :])
    grad_key = add_matmul(grad_key, grad_scores, query, PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["region_height", "region_width"])
def key_value_gradient(
    qkv,
    row_start,
    choosers,
    statistics,
    grad_out,
    grad_qkv,
    logit_scale,
    scale,
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
    """dK and dV of BLOCK_N tokens of one region and head; walks the queries that chose the region."""
    QK_DIM: tl.constexpr = NUM_HEADS * QK_HEAD_DIM
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    PACKED: tl.constexpr = 2 * QK_DIM + DIM
    N_REGIONS: tl.constexpr = N_WIN * N_WIN

    region_tokens = region_height * region_width
    image, region, tile, head = locate_program(tl.cdiv(region_tokens, BLOCK_N), NUM_HEADS, N_REGIONS)
    map_start = image * N_REGIONS * region_tokens

    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    _, key_live, key_token = tokens_of_tile(tile, region, region_height, region_width, N_WIN, BLOCK_N)
    key_start = map_start * PACKED + QK_DIM + head * QK_HEAD_DIM
    value_start = map_start * PACKED + 2 * QK_DIM + head * V_HEAD_DIM
    key = load_rows(qkv + key_start, key_token, qk_channel, key_live, PACKED, QK_HEAD_DIM, True)
    value = load_rows(qkv + value_start, key_token, v_channel, key_live, PACKED, V_HEAD_DIM, True)

    query_base = qkv + map_start * PACKED + head * QK_HEAD_DIM
    grad_out_base = grad_out + map_start * DIM + head * V_HEAD_DIM
    head_statistics = statistics + (image * NUM_HEADS + head) * N_REGIONS * region_tokens * 2
    first = tl.load(row_start + image * (N_REGIONS + 1) + region)
    last = tl.load(row_start + image * (N_REGIONS + 1) + region + 1)
    choosers_row = choosers + image * (N_REGIONS * TOPK) + first
    grad_key = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    slot, row, column = list_position(tl.arange(0, BLOCK_M), region_height, region_width)
    slot_step, row_step, column_step = list_position(BLOCK_M, region_height, region_width)
    list_length = (last - first) * region_tokens
    full = list_length - list_length % BLOCK_M
    for _ in tl.range(0, full, BLOCK_M):
        chooser = tl.load(choosers_row + slot)
        token = token_of(chooser, row, column, region_height, region_width, N_WIN)
        query = load_rows(query_base, token, qk_channel, None, PACKED, QK_HEAD_DIM, False)
        do = load_rows(grad_out_base, token, v_channel, None, DIM, V_HEAD_DIM, False)
        query_index = chooser * region_tokens + row * region_width + column
        lse, delta = _load_statistics(head_statistics, query_index, None, False)
        grad_key, grad_value = _key_value_gradient_tile(
            grad_key, grad_value, key, value, query, do, lse, delta, logit_scale, PRECISION
        )
        slot, row, column = advance(
            slot, row, column, slot_step, row_step, column_step, region_height, region_width
        )
    if full < list_length:
        live = full + tl.arange(0, BLOCK_M) < list_length
        chooser = tl.load(choosers_row + slot, mask=live, other=0)
        token = token_of(chooser, row, column, region_height, region_width, N_WIN)
        query = load_rows(query_base, token, qk_channel, live, PACKED, QK_HEAD_DIM, True)
        do = load_rows(grad_out_base, token, v_channel, live, DIM, V_HEAD_DIM, True)
        query_index = chooser * region_tokens + row * region_width + column
        lse, delta = _load_statistics(head_statistics, query_index, live, True)
        grad_key, grad_value = _key_value_gradient_tile(
            grad_key, grad_value, key, value, query, do, lse, delta, logit_scale, PRECISION
        )

    grad_rows = grad_qkv + key_token[:, None] * PACKED
    tl.store(
        grad_rows + key_start + qk_channel[None, :],
        (grad_key * scale).to(grad_qkv.dtype.element_ty),
        mask=key_live[:, None] & (qk_channel < QK_HEAD_DIM)[None, :],
    )
    tl.store(
        grad_rows + value_start + v_channel[None, :],
        grad_value.to(grad_qkv.dtype.element_ty),
        mask=key_live[:, None] & (v_channel < V_HEAD_DIM)[None, :],
    )
