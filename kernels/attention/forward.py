"""Forward: token-to-token attention over the routed regions, keys and values read in place.

One program computes BLOCK_M queries of one region and head against the listed keys, with the online softmax
of FlashAttention-2. LePE, if there is any, is added on the way out: what the separate kernel would write and
read again stays in registers.

With marks, small regions share programs: the queries of all regions stand in one row, as if the map were one
region, and so do the keys, in one `key_list` of shape (list_length,). A product of marks masks what was not
chosen. It adds -2**30, not minus infinity, so that a step without a chosen key needs no guard: what such
steps summed up is multiplied by exp2(-2**30 * logit_scale) = 0 at the first chosen key.

| array | shape | meaning |
|---|---|---|
| query, key, value | (N, H, W, ...) | maps, or slices of one packed map; row strides QUERY_STRIDE, ... |
| region_list | (P, S) int32 | tokens of every query region |
| key_list | (N, G, P, list_length) int32 | keys that each region attends to, -1 for padding |
| key_padding, value_padding | (heads * head_dim,) | what padding holds; None where there is none |
| factors | (N, G, P, list_length) fp32 | factor of each listed key and value; None for 1 |
| query_regions, query_marks, key_marks | | the graph as a mask, see `lists.mark_choices`; or None |
| out | (N, H, W, NUM_HEADS * V_HEAD_DIM) | attention output, plus LePE |
| attention | as out | attention output alone, for the backward; None where nobody needs it |
| lepe_value, lepe_fill, lepe_weight, lepe_bias | | values at full resolution, and the rest, as in `lepe` |
| lse | (N, NUM_HEADS, H * W) fp32 | log2 of the softmax's denominator, of base-2 logits |
"""

import triton
import triton.language as tl

from ..lepe.convolution import convolve_tile
from ..lib.addressing import graph_of, load_rows, locate_program, own_tokens, store_rows
from ..lib.exponential import exp2
from ..lib.matrix import add_matmul, matmul


@triton.jit
def _attend_tile(
    acc,
    row_max,
    row_sum,
    query,
    key,
    value,
    factor,
    own_marks,
    marks,
    live,
    logit_scale,
    EXP_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: BLOCK_M queries against BLOCK_N keys."""
    scores = matmul(query, tl.trans(key), PRECISION)
    if own_marks is not None:
        scores = add_matmul(scores, own_marks, tl.trans(marks), "ieee")
    if factor is not None:
        scores *= factor[None, :]
    if live is not None:
        scores = tl.where(live[None, :], scores, float("-inf"))
    # The scale is positive, so it may be applied to the maximum and inside the exponent: one
    # multiply-add a score instead of a multiplication and a subtraction.
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * logit_scale)
    probs = exp2(scores * logit_scale - new_max[:, None], EXP_SHARE)
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    if factor is not None:
        probs *= factor[None, :]
    acc = add_matmul(acc * rescale[:, None], probs, value, PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _lepe_of_head(
    value,
    fill,
    weight,
    bias,
    own,
    head,
    height,
    width,
    padded_height,
    padded_width,
    V_HEAD_DIM: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """LePE of one head at the tokens `own` of one image, whose first value is `value`."""
    live = own >= 0
    row = own // width
    in_head = tl.arange(0, BLOCK_V)
    return convolve_tile(
        value,
        value if fill is None else fill,
        weight,
        value if bias is None else bias,
        row,
        own - row * width,
        height,
        width,
        padded_height,
        padded_width,
        head * V_HEAD_DIM + in_head,
        live,
        in_head < V_HEAD_DIM,
        VALUE_STRIDE,
        KERNEL,
        fill is not None,
        bias is not None,
    )


@triton.jit(
    do_not_specialize=[
        *("map_tokens", "kv_tokens", "n_regions", "region_tokens", "list_length"),
        *("height", "width", "padded_height", "padded_width"),
    ]
)
def attention_forward(
    query,
    key,
    value,
    region_list,
    key_list,
    key_padding,
    value_padding,
    factors,
    query_regions,
    query_marks,
    key_marks,
    lepe_value,
    lepe_fill,
    lepe_weight,
    lepe_bias,
    out,
    attention,
    lse,
    logit_scale,
    map_tokens,
    kv_tokens,
    n_regions,
    region_tokens,
    list_length,
    height,
    width,
    padded_height,
    padded_width,
    NUM_HEADS: tl.constexpr,
    N_GRAPHS: tl.constexpr,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    LEPE_STRIDE: tl.constexpr,
    LEPE_KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_QK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_MARKS: tl.constexpr,
    EXP_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and lse of BLOCK_M queries of one region and head."""
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    image, region, tile, head = locate_program(
        n_regions if query_marks is None else 1, tl.cdiv(region_tokens, BLOCK_M), NUM_HEADS
    )
    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    index, exists, own = own_tokens(region_list, region, tile, region_tokens, BLOCK_M)
    query_start = image * map_tokens * QUERY_STRIDE + head * QK_HEAD_DIM
    q = load_rows(query + query_start, None, own, qk_channel, own >= 0, QUERY_STRIDE, QK_HEAD_DIM)

    key_base = key + image * kv_tokens * KEY_STRIDE + head * QK_HEAD_DIM
    value_base = value + image * kv_tokens * VALUE_STRIDE + head * V_HEAD_DIM
    if key_padding is not None:
        key_padding += head * QK_HEAD_DIM
        value_padding += head * V_HEAD_DIM
    first_row = graph_of(image, head, N_GRAPHS) * n_regions
    list_start = 0
    own_marks = None
    mark = tl.arange(0, BLOCK_MARKS)
    if query_marks is None:
        list_start = (first_row + region) * list_length
    else:
        row = first_row + tl.load(query_regions + index, mask=exists, other=0)
        own_marks = load_rows(query_marks, None, row, mark, exists, BLOCK_MARKS, BLOCK_MARKS)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # Full tiles carry no key mask; the rest of the list is peeled off as one masked tile.
    position = tl.arange(0, BLOCK_N)
    place = key_list + list_start + position
    full = list_length - list_length % BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        token = tl.load(place)
        place += BLOCK_N
        k = load_rows(key_base, key_padding, token, qk_channel, None, KEY_STRIDE, QK_HEAD_DIM)
        v = load_rows(value_base, value_padding, token, v_channel, None, VALUE_STRIDE, V_HEAD_DIM)
        factor = None if factors is None else tl.load(factors + list_start + start + position)
        marks = None
        if query_marks is not None:
            marks = load_rows(key_marks, None, start + position, mark, None, BLOCK_MARKS, BLOCK_MARKS)
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k, v, factor, own_marks, marks, None, logit_scale, EXP_SHARE, PRECISION
        )
    position = tl.arange(0, BLOCK_TAIL)
    for start in tl.range(full, list_length, BLOCK_TAIL, num_stages=1):
        live = start + position < list_length
        token = tl.load(key_list + list_start + start + position, mask=live, other=-1)
        k = load_rows(key_base, key_padding, token, qk_channel, live, KEY_STRIDE, QK_HEAD_DIM)
        v = load_rows(value_base, value_padding, token, v_channel, live, VALUE_STRIDE, V_HEAD_DIM)
        factor = None
        if factors is not None:
            factor = tl.load(factors + list_start + start + position, mask=live, other=1.0)
        marks = None
        if query_marks is not None:
            marks = load_rows(key_marks, None, start + position, mark, live, BLOCK_MARKS, BLOCK_MARKS)
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k, v, factor, own_marks, marks, live, logit_scale, 0, PRECISION
        )

    # One division a row: for each number the compiler would guard against quotients out of range.
    acc *= (1 / row_sum)[:, None]
    head_start = image * map_tokens * DIM + head * V_HEAD_DIM
    if attention is not None:
        store_rows(attention + head_start, own, v_channel, own >= 0, acc, DIM, V_HEAD_DIM)
    if LEPE_KERNEL > 0:
        acc += _lepe_of_head(
            lepe_value + image * map_tokens * LEPE_STRIDE,
            lepe_fill,
            lepe_weight,
            lepe_bias,
            own,
            head,
            height,
            width,
            padded_height,
            padded_width,
            V_HEAD_DIM,
            LEPE_STRIDE,
            LEPE_KERNEL,
            BLOCK_V,
        )
    store_rows(out + head_start, own, v_channel, own >= 0, acc, DIM, V_HEAD_DIM)
    lse_base = lse + (image * NUM_HEADS + head) * map_tokens
    tl.store(lse_base + own, row_max + tl.log2(row_sum), mask=own >= 0)
