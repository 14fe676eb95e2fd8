"""Gradients of keys and values, dK and dV, each written once by the program that owns it, without atomics.

With the letters of `query_gradient`: dK = scale * (f * dS)^T Q, dV = (f * P)^T dO. A row of the inverse graph
stands for the queries that chose one region. If the row was cut into pieces, the programs of each piece write
a partial sum, and `finish_gradients_kernel` adds the partial sums in order.

| array | shape | meaning |
|---|---|---|
| maps, padding, marks | | as in `forward` |
| lists | | keys that programs own, queries that attend to each region, see `routing.arguments.Lists` |
| work | | pieces of the inverse graph's rows, see `routing.graph`; None with marks or a single region |
| statistics | (N, NUM_HEADS, H * W, 2) fp32 | lse and delta, from `query_gradient` |
| grad_out | (N, H, W, NUM_HEADS * V_HEAD_DIM) | gradient of the attention's output |
| results | | gradients and partial sums, see `KeyValueResults` |
| pieces | | in `sum_pieces`: which rows were cut, see `Pieces` |
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
)
from ..lib.matrix import add_matmul, matmul


@triton.jit
def _load_statistics(statistics, token, live):
    """lse and delta of the queries `token`, (tokens,) each, 0 where not live; `live` is None if all are live.

    A single load reads both, as pairs. If a load has fewer elements than the layout of the products has
    threads, the compiler repeats it with all its address arithmetic: two loads, each of single numbers, took
    236 integer instructions a step instead of 63 (128 keys x 64 queries, 8 warps, head 32, sm_90).
    """
    pairs = statistics + token.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
    if live is None:
        pair = tl.load(pairs)
    else:
        pair = tl.load(pairs, mask=live[:, None], other=0.0)
    return tl.split(pair)


@triton.jit
def _key_value_gradient_tile(
    grad_key,
    grad_value,
    key,
    value,
    query,
    grad_out,
    statistics,
    factor,
    own_marks,
    marks,
    logit_scale,
    CONFIG: tl.constexpr,
):
    """Adds the contribution of a tile of queries to the gradients of BLOCK_N keys and values.

    `statistics` holds lse and delta of the queries. All tiles are transposed (keys by queries), so that the
    accumulators stay in registers. Dead queries need no mask: their rows of `query` and `grad_out` are 0, so
    they add 0, although their probability is 2**0. The products that do not depend on the exponential come
    first, which frees registers; in another order the tile of 128 keys x 64 queries spills (4 warps, head 32,
    sm_90).
    """
    PRECISION: tl.constexpr = CONFIG.PRECISION
    lse, delta = statistics
    grad_probs = matmul(value, tl.trans(grad_out), PRECISION)
    scores = matmul(key, tl.trans(query), PRECISION)
    if own_marks is not None:
        scores = add_matmul(scores, own_marks, tl.trans(marks), "ieee")
    if factor is not None:
        scores *= factor[None, :]
    probs = tl.exp2(scores * logit_scale - lse[None, :])
    weighted = probs if factor is None else probs * factor[None, :]
    grad_value = add_matmul(grad_value, weighted, grad_out, PRECISION)
    if factor is not None:
        grad_probs *= factor[None, :]
    grad_scores = probs * (grad_probs - delta[None, :])
    if factor is not None:
        grad_scores *= factor[None, :]
    grad_key = add_matmul(grad_key, grad_scores, query, PRECISION)
    return grad_key, grad_value


@triton.jit
def _store_key_value_gradient(
    results, first_token, padding_row, head, own, exists, keys, values, CONFIG: tl.constexpr
):
    """Stores final gradients of one head: rows of the map in the map, the sum over padding in `grad_padding`.

    With ADDS_TO_VALUE gradients of values are added to LePE's share, which the map already holds.

    Args:
        results: a `KeyValueResults`.
        first_token: number of the image's first token in the batch.
        padding_row: number of the tile's row in `grad_padding`.
        head: number of the head.
        own: (tokens,), each row's token number in the image's map, -1 for padding.
        exists: (tokens,), False for rows past the region's end.
        keys: (tokens, BLOCK_QK) gradients of keys.
        values: (tokens, BLOCK_V) gradients of values.
        CONFIG: an `AttentionConfig`.
    """
    KEY_STRIDE: tl.constexpr = CONFIG.GRAD_KEY_STRIDE
    VALUE_STRIDE: tl.constexpr = CONFIG.GRAD_VALUE_STRIDE
    QK_HEAD_DIM: tl.constexpr = CONFIG.QK_HEAD_DIM
    V_HEAD_DIM: tl.constexpr = CONFIG.V_HEAD_DIM
    qk_channel = tl.arange(0, CONFIG.BLOCK_QK)
    v_channel = tl.arange(0, CONFIG.BLOCK_V)
    key_base = results.grad_key + first_token * KEY_STRIDE + head * QK_HEAD_DIM
    value_base = results.grad_value + first_token * VALUE_STRIDE + head * V_HEAD_DIM
    store_rows(key_base, own, qk_channel, own >= 0, keys, KEY_STRIDE, QK_HEAD_DIM)
    of_map = values
    if CONFIG.ADDS_TO_VALUE:
        of_map += load_rows(value_base, None, own, v_channel, own >= 0, VALUE_STRIDE, V_HEAD_DIM).to(
            tl.float32
        )
    store_rows(value_base, own, v_channel, own >= 0, of_map, VALUE_STRIDE, V_HEAD_DIM)
    if results.grad_padding is not None:
        padding = (exists & (own < 0))[:, None]
        of_keys = tl.sum(tl.where(padding, keys, 0.0), axis=0)
        of_values = tl.sum(tl.where(padding, values, 0.0), axis=0)
        share = results.grad_padding + padding_row * (QK_HEAD_DIM + V_HEAD_DIM)
        tl.store(share + qk_channel, of_keys, mask=qk_channel < QK_HEAD_DIM)
        tl.store(share + QK_HEAD_DIM + v_channel, of_values, mask=v_channel < V_HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        *("map_tokens", "kv_tokens", "n_pairs", "n_regions", "n_pieces", "n_partials"),
        *("region_tokens", "query_region_tokens"),
    ]
)
def key_value_gradient_kernel(
    maps,
    lists,
    padding,
    marks,
    work,
    statistics,
    grad_out,
    results,
    logit_scale,
    scale,
    map_tokens,
    kv_tokens,
    n_pairs,
    n_regions,
    n_pieces,
    n_partials,
    region_tokens,
    query_region_tokens,
    CONFIG: tl.constexpr,
):
    """dK and dV of BLOCK_N tokens of one region and head, from one piece of the region's row of queries."""
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
    QUERY_IS_PADDED: tl.constexpr = CONFIG.QUERY_IS_PADDED
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    tiles = tl.cdiv(region_tokens, BLOCK_N)
    image, piece, tile, head = locate_program(tl.program_id(0), n_pieces, tiles, NUM_HEADS)
    graph = graph_of(image, head, N_GRAPHS)
    if work is not None:
        piece_work = work + (graph * n_pieces + piece) * 4
        region = tl.load(piece_work)
        if region < 0:
            return
        first = tl.load(piece_work + 1)
        last = tl.load(piece_work + 2)
        list_start = (graph * n_pairs + first) * query_region_tokens
        list_length = (last - first) * query_region_tokens
    else:
        region = piece
        list_start = 0
        list_length = query_region_tokens

    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    index, exists, own = own_tokens(lists.region_list, region, tile, region_tokens, BLOCK_N)
    key_start = image * kv_tokens * KEY_STRIDE + head * QK_HEAD_DIM
    value_start = image * kv_tokens * VALUE_STRIDE + head * V_HEAD_DIM
    key_padding = None if padding is None else padding.key + head * QK_HEAD_DIM
    value_padding = None if padding is None else padding.value + head * V_HEAD_DIM
    k = load_rows(maps.key + key_start, key_padding, own, qk_channel, exists, KEY_STRIDE, QK_HEAD_DIM)
    v = load_rows(maps.value + value_start, value_padding, own, v_channel, exists, VALUE_STRIDE, V_HEAD_DIM)

    query_base = maps.query + image * map_tokens * QUERY_STRIDE + head * QK_HEAD_DIM
    grad_out_base = grad_out + image * map_tokens * DIM + head * V_HEAD_DIM
    head_statistics = statistics + (image * NUM_HEADS + head) * map_tokens * 2
    grad_k = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    mark = tl.arange(0, BLOCK_MARKS)
    own_marks = None
    if marks is not None:
        query_marks = marks.query_marks + graph * n_pairs * BLOCK_MARKS
        own_marks = load_rows(marks.key_marks, None, index, mark, exists, BLOCK_MARKS, BLOCK_MARKS)

    position = tl.arange(0, BLOCK_M)
    place = places_of(lists.token_list, list_start + position)
    full = list_length - list_length % BLOCK_M
    for start in tl.range(0, full, BLOCK_M):
        token = tokens_at(lists.token_list, place, None)
        place += BLOCK_M
        live = token >= 0 if QUERY_IS_PADDED else None
        q = load_rows(query_base, None, token, qk_channel, live, QUERY_STRIDE, QK_HEAD_DIM)
        do = load_rows(grad_out_base, None, token, v_channel, live, DIM, V_HEAD_DIM)
        pair = _load_statistics(head_statistics, token, live)
        factor = None if lists.factors is None else tl.load(lists.factors + list_start + start + position)
        other_marks = None
        if marks is not None:
            query_region = tl.load(marks.query_regions + start + position)
            other_marks = load_rows(query_marks, None, query_region, mark, None, BLOCK_MARKS, BLOCK_MARKS)
        grad_k, grad_v = _key_value_gradient_tile(
            grad_k, grad_v, k, v, q, do, pair, factor, own_marks, other_marks, logit_scale, CONFIG
        )
    position = tl.arange(0, BLOCK_TAIL)
    for start in tl.range(full, list_length, BLOCK_TAIL, num_stages=1):
        in_list = start + position < list_length
        at = places_of(lists.token_list, list_start + start + position)
        token = tokens_at(lists.token_list, at, in_list)
        live = token >= 0
        q = load_rows(query_base, None, token, qk_channel, live, QUERY_STRIDE, QK_HEAD_DIM)
        do = load_rows(grad_out_base, None, token, v_channel, live, DIM, V_HEAD_DIM)
        pair = _load_statistics(head_statistics, token, live)
        factor = None
        if lists.factors is not None:
            factor = tl.load(lists.factors + list_start + start + position, mask=in_list, other=1.0)
        other_marks = None
        if marks is not None:
            query_region = tl.load(marks.query_regions + start + position, mask=in_list, other=0)
            other_marks = load_rows(query_marks, None, query_region, mark, in_list, BLOCK_MARKS, BLOCK_MARKS)
        grad_k, grad_v = _key_value_gradient_tile(
            grad_k, grad_v, k, v, q, do, pair, factor, own_marks, other_marks, logit_scale, CONFIG
        )

    grad_k *= scale
    partial = -1 if work is None else tl.load(piece_work + 3)
    if partial >= 0:
        row = ((image * NUM_HEADS + head) * n_partials + partial) * region_tokens
        store_rows(
            results.partial_key + row * QK_HEAD_DIM,
            index,
            qk_channel,
            exists,
            grad_k,
            QK_HEAD_DIM,
            QK_HEAD_DIM,
        )
        store_rows(
            results.partial_value + row * V_HEAD_DIM, index, v_channel, exists, grad_v, V_HEAD_DIM, V_HEAD_DIM
        )
    else:
        # Read the token numbers again from their list: with padding, keeping them during the loop spills
        # registers (128 x 64, 8 warps, head 64, sm_80). A single region without padding has no list. (When it
        # had one, keeping the list's address took two registers, which spilled on sm_90: 64 x 64, 2 warps.)
        if work is not None or QUERY_IS_PADDED:
            _, _, own = own_tokens(lists.region_list, region, tile, region_tokens, BLOCK_N, AGAIN=True)
        row = ((image * NUM_HEADS + head) * n_regions + region) * tiles + tile
        _store_key_value_gradient(results, image * kv_tokens, row, head, own, exists, grad_k, grad_v, CONFIG)


@triton.jit
def sum_pieces(
    program,
    pieces,
    results,
    kv_tokens,
    n_regions,
    n_partials,
    region_tokens,
    longest,
    CONFIG: tl.constexpr,
):
    """dK and dV of BLOCK_N tokens of a region whose row was cut: the pieces' partial sums, added in order."""
    NUM_HEADS: tl.constexpr = CONFIG.NUM_HEADS
    N_GRAPHS: tl.constexpr = CONFIG.N_GRAPHS
    QK_HEAD_DIM: tl.constexpr = CONFIG.QK_HEAD_DIM
    V_HEAD_DIM: tl.constexpr = CONFIG.V_HEAD_DIM
    BLOCK_N: tl.constexpr = CONFIG.BLOCK_N
    BLOCK_QK: tl.constexpr = CONFIG.BLOCK_QK
    BLOCK_V: tl.constexpr = CONFIG.BLOCK_V
    tiles = tl.cdiv(region_tokens, BLOCK_N)
    image, region, tile, head = locate_program(program, n_regions, tiles, NUM_HEADS)
    graph = graph_of(image, head, N_GRAPHS)
    row = pieces.row_start + graph * (n_regions + 1) + region
    first = tl.load(row)
    length = tl.load(row + 1) - first
    # A row that was not cut has no partial sums, and nothing is written for it.
    n_own = tl.where(length > longest, tl.cdiv(length, longest), 0)
    partial = 2 * (first // longest)  # see `_cut_row` in `routing.graph`

    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    index, exists, own = own_tokens(pieces.region_list, region, tile, region_tokens, BLOCK_N)
    grad_k = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    start = ((image * NUM_HEADS + head) * n_partials + partial) * region_tokens
    for piece in tl.range(0, n_own):
        at = start + piece * region_tokens
        grad_k += load_rows(
            results.partial_key + at * QK_HEAD_DIM, None, index, qk_channel, exists, QK_HEAD_DIM, QK_HEAD_DIM
        )
        grad_v += load_rows(
            results.partial_value + at * V_HEAD_DIM, None, index, v_channel, exists, V_HEAD_DIM, V_HEAD_DIM
        )

    if n_own > 0:
        padding_row = ((image * NUM_HEADS + head) * n_regions + region) * tiles + tile
        _store_key_value_gradient(
            results, image * kv_tokens, padding_row, head, own, exists, grad_k, grad_v, CONFIG
        )
