"""Gradient of the queries, dQ, without atomics; also the statistics that dK/dV reads.

Each program computes dQ of the queries that it owns. Probabilities are computed again from the saved `lse`,
as in FlashAttention-2. With P the probabilities, dO the output's gradient, dP = dO V^T, f the factor of a
key's region and delta = rowsum(dO * O): dS = P * (f * dP - delta) and dQ = scale * (f * dS) K. The factor's
gradient is the sum of scale * dS * (Q K^T) + P * dP over a region's queries and the chosen region's keys.

| array | shape | meaning |
|---|---|---|
| maps, lists, padding, marks | | as in `forward` |
| saved | | out, lse and grad_out, see `Saved` |
| results | | grad_query, statistics and grad_factor, see `QueryResults` |
"""

import triton
import triton.language as tl

from ..lib.addressing import (
    graph_of,
    load_rows,
    locate_program,
    own_tokens,
    places_of,
    store_rows,
    tokens_at,
    walked_length,
)
from ..lib.exponential import exp2
from ..lib.matrix import add_matmul, matmul


@triton.jit
def _query_gradient_tile(
    grad_query,
    query,
    grad_out,
    statistics,
    key,
    value,
    factor,
    own_marks,
    marks,
    live,
    logit_scale,
    CONFIG: tl.constexpr,
):
    """Adds a tile of keys' contribution to `grad_query`, the gradient of BLOCK_M queries without `scale`.

    `statistics` holds lse and delta of the queries; `live` is None if all keys are live. Returns the new
    `grad_query` and, for the factor's gradient, the tiles P * dP and dS * (Q K^T).
    """
    PRECISION: tl.constexpr = CONFIG.PRECISION
    lse, delta = statistics
    products = matmul(query, tl.trans(key), PRECISION)
    if own_marks is not None:
        products = add_matmul(products, own_marks, tl.trans(marks), "ieee")
    scores = products if factor is None else products * factor[None, :]
    probs = exp2(scores * logit_scale - lse[:, None], CONFIG.EXP_SHARE if live is None else 0)
    if live is not None:
        # The row of a dead key is 0, so its score is 0, and exp2(0 - lse) may overflow if lse is far below 0.
        probs = tl.where(live[None, :], probs, 0.0)
    grad_probs = matmul(grad_out, tl.trans(value), PRECISION)
    weighted = grad_probs if factor is None else grad_probs * factor[None, :]
    grad_scores = probs * (weighted - delta[:, None])
    grad_products = grad_scores if factor is None else grad_scores * factor[None, :]
    grad_query = add_matmul(grad_query, grad_products, key, PRECISION)
    return grad_query, probs * grad_probs, grad_scores * products


@triton.jit
def _add_by_slot(total, of_values, of_scores, scale, position, region_tokens):
    """Sums each column of `of_values + of_scores * scale`, and adds it to `total` at the column's slot."""
    column = tl.sum(of_values + of_scores * scale, axis=0)
    slot = position // region_tokens
    belongs = slot[:, None] == tl.arange(0, total.shape[0])[None, :]
    return total + tl.sum(tl.where(belongs, column[:, None], 0.0), axis=0)


@triton.jit(
    do_not_specialize=[
        *("map_tokens", "kv_tokens", "n_regions", "region_tokens", "list_length", "kv_region_tokens"),
    ]
)
def query_gradient_kernel(
    maps,
    lists,
    padding,
    marks,
    saved,
    results,
    logit_scale,
    scale,
    map_tokens,
    kv_tokens,
    n_regions,
    region_tokens,
    list_length,
    kv_region_tokens,
    CONFIG: tl.constexpr,
):
    """dQ of BLOCK_M queries of one region and head; loops over the same keys as the forward."""
    NUM_HEADS: tl.constexpr = CONFIG.NUM_HEADS
    N_GRAPHS: tl.constexpr = CONFIG.N_GRAPHS
    QK_HEAD_DIM: tl.constexpr = CONFIG.QK_HEAD_DIM
    V_HEAD_DIM: tl.constexpr = CONFIG.V_HEAD_DIM
    QUERY_STRIDE: tl.constexpr = CONFIG.QUERY_STRIDE
    KEY_STRIDE: tl.constexpr = CONFIG.KEY_STRIDE
    VALUE_STRIDE: tl.constexpr = CONFIG.VALUE_STRIDE
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_TAIL: tl.constexpr = CONFIG.BLOCK_TAIL
    BLOCK_QK: tl.constexpr = CONFIG.BLOCK_QK
    BLOCK_V: tl.constexpr = CONFIG.BLOCK_V
    BLOCK_MARKS: tl.constexpr = CONFIG.BLOCK_MARKS
    GRAD_QUERY_STRIDE: tl.constexpr = CONFIG.GRAD_QUERY_STRIDE
    BLOCK_SLOTS: tl.constexpr = CONFIG.BLOCK_SLOTS
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    tiles = tl.cdiv(region_tokens, BLOCK_M)
    image, region, tile, head = locate_program(
        tl.program_id(0), n_regions if marks is None else 1, tiles, NUM_HEADS
    )
    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    index, exists, own = own_tokens(lists.region_list, region, tile, region_tokens, BLOCK_M)
    query_start = image * map_tokens * QUERY_STRIDE + head * QK_HEAD_DIM
    q = load_rows(maps.query + query_start, None, own, qk_channel, own >= 0, QUERY_STRIDE, QK_HEAD_DIM)
    out_start = image * map_tokens * DIM + head * V_HEAD_DIM
    do = load_rows(saved.grad_out + out_start, None, own, v_channel, own >= 0, DIM, V_HEAD_DIM)
    o = load_rows(saved.out + out_start, None, own, v_channel, own >= 0, DIM, V_HEAD_DIM)
    head_start = (image * NUM_HEADS + head) * map_tokens
    lse = tl.load(saved.lse + head_start + own, mask=own >= 0, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    pair = results.statistics + (head_start + own) * 2
    tl.store(pair, lse, mask=own >= 0)
    tl.store(pair + 1, delta, mask=own >= 0)

    key_base = maps.key + image * kv_tokens * KEY_STRIDE + head * QK_HEAD_DIM
    value_base = maps.value + image * kv_tokens * VALUE_STRIDE + head * V_HEAD_DIM
    key_padding = None if padding is None else padding.key + head * QK_HEAD_DIM
    value_padding = None if padding is None else padding.value + head * V_HEAD_DIM
    first_row = graph_of(image, head, N_GRAPHS) * n_regions
    list_start = 0
    walked = list_length
    own_marks = None
    mark = tl.arange(0, BLOCK_MARKS)
    if marks is None:
        list_start = (first_row + region) * list_length
        if CONFIG.QUERY_IS_PADDED:
            walked = walked_length(lists.region_list, region, region_tokens, list_length)
    else:
        row = first_row + tl.load(marks.query_regions + index, mask=exists, other=0)
        own_marks = load_rows(marks.query_marks, None, row, mark, exists, BLOCK_MARKS, BLOCK_MARKS)
    grad = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    by_slot = tl.zeros([BLOCK_SLOTS], tl.float32)

    position = tl.arange(0, BLOCK_N)
    place = places_of(lists.token_list, list_start + position)
    full = walked - walked % BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        token = tokens_at(lists.token_list, place, None)
        place += BLOCK_N
        k = load_rows(key_base, key_padding, token, qk_channel, None, KEY_STRIDE, QK_HEAD_DIM)
        v = load_rows(value_base, value_padding, token, v_channel, None, VALUE_STRIDE, V_HEAD_DIM)
        factor = None if lists.factors is None else tl.load(lists.factors + list_start + start + position)
        other_marks = None
        if marks is not None:
            other_marks = load_rows(
                marks.key_marks, None, start + position, mark, None, BLOCK_MARKS, BLOCK_MARKS
            )
        grad, of_values, of_scores = _query_gradient_tile(
            grad, q, do, (lse, delta), k, v, factor, own_marks, other_marks, None, logit_scale, CONFIG
        )
        if results.grad_factor is not None:
            by_slot = _add_by_slot(by_slot, of_values, of_scores, scale, start + position, kv_region_tokens)
    position = tl.arange(0, BLOCK_TAIL)
    for start in tl.range(full, walked, BLOCK_TAIL, num_stages=1):
        live = start + position < walked
        at = places_of(lists.token_list, list_start + start + position)
        token = tokens_at(lists.token_list, at, live)
        k = load_rows(key_base, key_padding, token, qk_channel, live, KEY_STRIDE, QK_HEAD_DIM)
        v = load_rows(value_base, value_padding, token, v_channel, live, VALUE_STRIDE, V_HEAD_DIM)
        factor = None
        if lists.factors is not None:
            factor = tl.load(lists.factors + list_start + start + position, mask=live, other=1.0)
        other_marks = None
        if marks is not None:
            other_marks = load_rows(
                marks.key_marks, None, start + position, mark, live, BLOCK_MARKS, BLOCK_MARKS
            )
        grad, of_values, of_scores = _query_gradient_tile(
            grad, q, do, (lse, delta), k, v, factor, own_marks, other_marks, live, logit_scale, CONFIG
        )
        if results.grad_factor is not None:
            by_slot = _add_by_slot(by_slot, of_values, of_scores, scale, start + position, kv_region_tokens)

    grad_base = results.grad_query + image * map_tokens * GRAD_QUERY_STRIDE + head * QK_HEAD_DIM
    store_rows(grad_base, own, qk_channel, own >= 0, grad * scale, GRAD_QUERY_STRIDE, QK_HEAD_DIM)
    if results.grad_factor is not None:
        slot = tl.arange(0, BLOCK_SLOTS)
        topk = list_length // kv_region_tokens
        row = ((image * NUM_HEADS + head) * n_regions + region) * tiles + tile
        tl.store(results.grad_factor + row * topk + slot, by_slot, mask=slot < topk)
