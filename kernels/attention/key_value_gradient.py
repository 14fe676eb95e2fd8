"""Gradients of keys and values, each written once by one owner, without atomics.

With the letters of `query_gradient`: dK = scale * (f * dS)^T Q, dV = (f * P)^T dO. A row of the inverse
graph, the queries that chose a region, may be cut into pieces; then each piece writes a partial sum, and
`sum_pieces` adds them in order.

| array | shape | meaning |
|---|---|---|
| query, key, value, key_padding, value_padding | | as in `forward` |
| region_list | (P_kv, S_kv) int32 | tokens of every key region |
| query_list | (N, G, P * TOPK * S) int32 | queries of the pairs, in the order of the inverse graph |
| factors | as query_list, fp32 | factor of each listed query's pair; None for 1 |
| query_regions, query_marks, key_marks | | as in `forward`; with marks there is one list and no work |
| row_start, work | | the inverse graph and the pieces of its rows, see `lists` |
| statistics | (N, NUM_HEADS, H * W, 2) fp32 | lse and delta, from `query_gradient` |
| grad_out | (N, H, W, NUM_HEADS * V_HEAD_DIM) | gradient of the attention output |
| grad_key, grad_value | as key, value | gradients, or slices of one packed gradient |
| partial_key, partial_value | (N, NUM_HEADS, n_partials, S_kv, head_dim) fp32 | sums of pieces |
| grad_padding | (N, NUM_HEADS, P_kv, tiles, QK_HEAD_DIM + V_HEAD_DIM) fp32 | each tile's share, or None |
"""

import triton
import triton.language as tl

from ..lib.addressing import graph_of, load_rows, locate_program, own_tokens, store_rows
from ..lib.matrix import add_matmul, matmul


@triton.jit
def _load_statistics(statistics, token, live):
    """lse and delta of the queries `token`, 0 where not live (None: all are).

    One load of pairs, not two of single numbers: the compiler repeats a load of fewer elements than there are
    threads in the layout of the products, all its address arithmetic included (measured at 128 keys x 64
    queries, 8 warps, head 32, sm_90: 236 integer instructions a step against 63).
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
    lse,
    delta,
    factor,
    own_marks,
    marks,
    logit_scale,
    PRECISION: tl.constexpr,
):
    """Adds what BLOCK_M queries contribute to the gradients of BLOCK_N keys and values.

    Everything is transposed, keys by queries, so that the accumulators stay in registers. A dead query needs
    no mask: its rows of query and gradient are 0, so it adds 0 whatever its probability, 2**0. The products
    that need no exponential come first, which frees registers (128 keys x 64 queries, 4 warps, head 32,
    sm_90: the tile spills otherwise).
    """
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
    grad_key_base,
    grad_value_base,
    grad_padding_row,
    own,
    exists,
    qk_channel,
    v_channel,
    key_rows,
    value_rows,
    GRAD_KEY_STRIDE: tl.constexpr,
    GRAD_VALUE_STRIDE: tl.constexpr,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
):
    """Writes finished rows of one head: tokens of the map to the map, the sum over padding to its share."""
    store_rows(grad_key_base, own, qk_channel, own >= 0, key_rows, GRAD_KEY_STRIDE, QK_HEAD_DIM)
    store_rows(grad_value_base, own, v_channel, own >= 0, value_rows, GRAD_VALUE_STRIDE, V_HEAD_DIM)
    if grad_padding_row is not None:
        padding = (exists & (own < 0))[:, None]
        of_keys = tl.sum(tl.where(padding, key_rows, 0.0), axis=0)
        of_values = tl.sum(tl.where(padding, value_rows, 0.0), axis=0)
        tl.store(grad_padding_row + qk_channel, of_keys, mask=qk_channel < QK_HEAD_DIM)
        tl.store(grad_padding_row + QK_HEAD_DIM + v_channel, of_values, mask=v_channel < V_HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        *("map_tokens", "kv_tokens", "n_pairs", "n_regions", "n_pieces", "n_partials"),
        *("region_tokens", "query_region_tokens"),
    ]
)
def key_value_gradient(
    query,
    key,
    value,
    region_list,
    query_list,
    work,
    key_padding,
    value_padding,
    factors,
    query_regions,
    query_marks,
    key_marks,
    statistics,
    grad_out,
    grad_key,
    grad_value,
    partial_key,
    partial_value,
    grad_padding,
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
    NUM_HEADS: tl.constexpr,
    N_GRAPHS: tl.constexpr,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    GRAD_KEY_STRIDE: tl.constexpr,
    GRAD_VALUE_STRIDE: tl.constexpr,
    QUERY_IS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_MARKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of BLOCK_N tokens of one region and head, from one piece of the queries that chose it."""
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    tiles = tl.cdiv(region_tokens, BLOCK_N)
    image, piece, tile, head = locate_program(n_pieces, tiles, NUM_HEADS)
    graph = graph_of(image, head, N_GRAPHS)
    if query_marks is None:
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
    index, exists, own = own_tokens(region_list, region, tile, region_tokens, BLOCK_N)
    key_start = image * kv_tokens * KEY_STRIDE + head * QK_HEAD_DIM
    value_start = image * kv_tokens * VALUE_STRIDE + head * V_HEAD_DIM
    if key_padding is not None:
        key_padding += head * QK_HEAD_DIM
        value_padding += head * V_HEAD_DIM
    k = load_rows(key + key_start, key_padding, own, qk_channel, exists, KEY_STRIDE, QK_HEAD_DIM)
    v = load_rows(value + value_start, value_padding, own, v_channel, exists, VALUE_STRIDE, V_HEAD_DIM)

    query_base = query + image * map_tokens * QUERY_STRIDE + head * QK_HEAD_DIM
    grad_out_base = grad_out + image * map_tokens * DIM + head * V_HEAD_DIM
    head_statistics = statistics + (image * NUM_HEADS + head) * map_tokens * 2
    grad_k = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    mark = tl.arange(0, BLOCK_MARKS)
    own_marks = None
    if query_marks is not None:
        query_marks += graph * n_pairs * BLOCK_MARKS
        own_marks = load_rows(key_marks, None, index, mark, exists, BLOCK_MARKS, BLOCK_MARKS)

    position = tl.arange(0, BLOCK_M)
    place = query_list + list_start + position
    full = list_length - list_length % BLOCK_M
    for start in tl.range(0, full, BLOCK_M):
        token = tl.load(place)
        place += BLOCK_M
        live = token >= 0 if QUERY_IS_PADDED else None
        q = load_rows(query_base, None, token, qk_channel, live, QUERY_STRIDE, QK_HEAD_DIM)
        do = load_rows(grad_out_base, None, token, v_channel, live, DIM, V_HEAD_DIM)
        lse, delta = _load_statistics(head_statistics, token, live)
        factor = None if factors is None else tl.load(factors + list_start + start + position)
        marks = None
        if query_marks is not None:
            query_region = tl.load(query_regions + start + position)
            marks = load_rows(query_marks, None, query_region, mark, None, BLOCK_MARKS, BLOCK_MARKS)
        grad_k, grad_v = _key_value_gradient_tile(
            grad_k, grad_v, k, v, q, do, lse, delta, factor, own_marks, marks, logit_scale, PRECISION
        )
    position = tl.arange(0, BLOCK_TAIL)
    for start in tl.range(full, list_length, BLOCK_TAIL, num_stages=1):
        in_list = start + position < list_length
        token = tl.load(query_list + list_start + start + position, mask=in_list, other=-1)
        live = token >= 0
        q = load_rows(query_base, None, token, qk_channel, live, QUERY_STRIDE, QK_HEAD_DIM)
        do = load_rows(grad_out_base, None, token, v_channel, live, DIM, V_HEAD_DIM)
        lse, delta = _load_statistics(head_statistics, token, live)
        factor = None
        if factors is not None:
            factor = tl.load(factors + list_start + start + position, mask=in_list, other=1.0)
        marks = None
        if query_marks is not None:
            query_region = tl.load(query_regions + start + position, mask=in_list, other=0)
            marks = load_rows(query_marks, None, query_region, mark, in_list, BLOCK_MARKS, BLOCK_MARKS)
        grad_k, grad_v = _key_value_gradient_tile(
            grad_k, grad_v, k, v, q, do, lse, delta, factor, own_marks, marks, logit_scale, PRECISION
        )

    grad_k *= scale
    partial = -1 if query_marks is not None else tl.load(piece_work + 3)
    if partial >= 0:
        row = ((image * NUM_HEADS + head) * n_partials + partial) * region_tokens
        store_rows(
            partial_key + row * QK_HEAD_DIM, index, qk_channel, exists, grad_k, QK_HEAD_DIM, QK_HEAD_DIM
        )
        store_rows(partial_value + row * V_HEAD_DIM, index, v_channel, exists, grad_v, V_HEAD_DIM, V_HEAD_DIM)
    else:
        _, _, own = own_tokens(region_list, region, tile, region_tokens, BLOCK_N, AGAIN=True)
        padding_row = None
        if grad_padding is not None:
            row = ((image * NUM_HEADS + head) * n_regions + region) * tiles + tile
            padding_row = grad_padding + row * (QK_HEAD_DIM + V_HEAD_DIM)
        _store_key_value_gradient(
            grad_key + image * kv_tokens * GRAD_KEY_STRIDE + head * QK_HEAD_DIM,
            grad_value + image * kv_tokens * GRAD_VALUE_STRIDE + head * V_HEAD_DIM,
            padding_row,
            own,
            exists,
            qk_channel,
            v_channel,
            grad_k,
            grad_v,
            GRAD_KEY_STRIDE,
            GRAD_VALUE_STRIDE,
            QK_HEAD_DIM,
            V_HEAD_DIM,
        )


@triton.jit(
    do_not_specialize=[
        *("kv_tokens", "n_regions", "n_pieces", "n_partials", "region_tokens", "longest"),
    ]
)
def sum_pieces(
    row_start,
    work,
    region_list,
    partial_key,
    partial_value,
    grad_key,
    grad_value,
    grad_padding,
    kv_tokens,
    n_regions,
    n_pieces,
    n_partials,
    region_tokens,
    longest,
    NUM_HEADS: tl.constexpr,
    N_GRAPHS: tl.constexpr,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    GRAD_KEY_STRIDE: tl.constexpr,
    GRAD_VALUE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dK and dV of BLOCK_N tokens of a region whose row was split: its pieces, summed in order."""
    tiles = tl.cdiv(region_tokens, BLOCK_N)
    image, region, tile, head = locate_program(n_regions, tiles, NUM_HEADS)
    graph = graph_of(image, head, N_GRAPHS)
    partial = tl.load(work + (graph * n_pieces + region) * 4 + 3)
    if partial < 0:
        return
    row = row_start + graph * (n_regions + 1) + region
    pieces = tl.cdiv(tl.load(row + 1) - tl.load(row), longest)

    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    index, exists, own = own_tokens(region_list, region, tile, region_tokens, BLOCK_N)
    grad_k = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    start = ((image * NUM_HEADS + head) * n_partials + partial) * region_tokens
    for piece in tl.range(0, pieces):
        at = start + piece * region_tokens
        grad_k += load_rows(
            partial_key + at * QK_HEAD_DIM, None, index, qk_channel, exists, QK_HEAD_DIM, QK_HEAD_DIM
        )
        grad_v += load_rows(
            partial_value + at * V_HEAD_DIM, None, index, v_channel, exists, V_HEAD_DIM, V_HEAD_DIM
        )

    padding_row = None
    if grad_padding is not None:
        padding_row = grad_padding + (((image * NUM_HEADS + head) * n_regions + region) * tiles + tile) * (
            QK_HEAD_DIM + V_HEAD_DIM
        )
    _store_key_value_gradient(
        grad_key + image * kv_tokens * GRAD_KEY_STRIDE + head * QK_HEAD_DIM,
        grad_value + image * kv_tokens * GRAD_VALUE_STRIDE + head * V_HEAD_DIM,
        padding_row,
        own,
        exists,
        qk_channel,
        v_channel,
        grad_k,
        grad_v,
        GRAD_KEY_STRIDE,
        GRAD_VALUE_STRIDE,
        QK_HEAD_DIM,
        V_HEAD_DIM,
    )
