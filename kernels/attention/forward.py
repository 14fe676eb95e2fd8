"""Forward: token-to-token attention over the routed regions, keys and values read in place.

One program attends from BLOCK_M queries of one region and head to the listed keys, with the online softmax
of FlashAttention-2. LePE, if there is any, is added to the tile before it is stored, which saves writing the
attention's output and reading it again in another kernel.

The maximum of a row starts at the lowest finite number, not at minus infinity. If all keys of a step have
logits of minus infinity (a caller may mask keys through an extra channel), the step then adds 0 to the sums
(2**-126 for an exponential by multiply-adds), and the code need not guard against -inf - (-inf) = NaN. If
every key of a row has such a logit, the row's output is NaN, as a softmax gives.

With marks, a program's tile holds queries of several small regions, as if the map were one region, and every
program loops over all keys, whose list has the shape (list_length,) or, without padding, is None. The product
of the marks masks the keys that were not chosen: it adds -2**126 to their scores, not minus infinity. So
steps before the first chosen key leave sums that are not 0, but at the first chosen key the online softmax
multiplies these sums by exp2(-2**126 * logit_scale) = 0.

| array | shape | meaning |
|---|---|---|
| maps | | query, key and value, see `Maps` |
| lists | | queries that programs own, keys that each region attends to, see `routing.arguments.Lists` |
| padding | (heads * head_dim,) each | key and value that padding tokens hold; None without padding |
| marks | | the graph as a mask, see `routing.arguments.Marks`; None in forms without a mask |
| lepe | | values before any down-sampling, weight, fill and bias, see `LepeParts`; None for no LePE |
| results | | out, attention and lse, see `ForwardResults` |
"""

import triton
import triton.language as tl

from ..lepe.convolution import convolve_tile
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
from ..lib.exponential import LOWEST, exp2, larger_or_nan
from ..lib.matrix import add_matmul, matmul
from ..routing.arguments import MARK

# The number that the product of marks adds to the score of a key that was not chosen.
_NOT_CHOSEN = tl.constexpr(-(MARK**2))


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
    CONFIG: tl.constexpr,
):
    """One step of the online softmax: BLOCK_M queries and a tile of keys; `live` is None if all are live.

    Returns the new `acc`, `row_max` and `row_sum`.
    """
    PRECISION: tl.constexpr = CONFIG.PRECISION
    scores = matmul(query, tl.trans(key), PRECISION)
    if own_marks is not None:
        scores = add_matmul(scores, own_marks, tl.trans(marks), "ieee")
    if factor is not None:
        scores *= factor[None, :]
    if live is not None:
        scores = tl.where(live[None, :], scores, float("-inf"))
    # The scale is positive, so it may be applied to the maximum and inside the exponent: one
    # multiply-add a score instead of a multiplication and a subtraction.
    if CONFIG.EXP_SHARE > 0 and live is None:
        # `exp2` by multiply-adds would turn NaN into a finite number. The maximum keeps the NaN, which makes
        # the row's output NaN below, and costs no extra instruction per score.
        new_max = larger_or_nan(row_max, tl.reduce(scores, 1, larger_or_nan) * logit_scale)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * logit_scale)
    probs = exp2(scores * logit_scale - new_max[:, None], CONFIG.EXP_SHARE if live is None else 0)
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    if factor is not None:
        probs *= factor[None, :]
    acc = add_matmul(acc * rescale[:, None], probs, value, PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _lepe_of_head(lepe, first_value, own, head, sizes, CONFIG: tl.constexpr):
    """LePE of one head at the tokens `own` of one image; `first_value` and `sizes` as in `convolve_tile`."""
    _, width, _, _ = sizes
    row = own // width
    in_head = tl.arange(0, CONFIG.BLOCK_V)
    return convolve_tile(
        lepe,
        first_value,
        row,
        own - row * width,
        sizes,
        head * CONFIG.V_HEAD_DIM + in_head,
        own >= 0,
        in_head < CONFIG.V_HEAD_DIM,
        CONFIG.LEPE_STRIDE,
        CONFIG.LEPE_KERNEL,
    )


@triton.jit(
    do_not_specialize=[
        *("map_tokens", "kv_tokens", "n_regions", "region_tokens", "list_length"),
        *("height", "width", "padded_height", "padded_width"),
    ]
)
def attention_forward_kernel(
    maps,
    lists,
    padding,
    marks,
    lepe,
    results,
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
    CONFIG: tl.constexpr,
):
    """Output and lse of BLOCK_M queries of one region and head."""
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
    DIM: tl.constexpr = NUM_HEADS * V_HEAD_DIM
    image, region, tile, head = locate_program(
        tl.program_id(0), n_regions if marks is None else 1, tl.cdiv(region_tokens, BLOCK_M), NUM_HEADS
    )
    qk_channel = tl.arange(0, BLOCK_QK)
    v_channel = tl.arange(0, BLOCK_V)
    index, exists, own = own_tokens(lists.region_list, region, tile, region_tokens, BLOCK_M)
    query_start = image * map_tokens * QUERY_STRIDE + head * QK_HEAD_DIM
    q = load_rows(maps.query + query_start, None, own, qk_channel, own >= 0, QUERY_STRIDE, QK_HEAD_DIM)

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
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # This loop takes full tiles and needs no mask; the next one takes the rest of the list in masked steps.
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
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k, v, factor, own_marks, other_marks, None, logit_scale, CONFIG
        )
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
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, q, k, v, factor, own_marks, other_marks, live, logit_scale, CONFIG
        )

    # The maximum tells whether all chosen keys of a row have logits of minus infinity. The sum does not: it
    # may be above 0, since exp2(-inf) by multiply-adds is not 0, and masked keys have finite scores.
    nothing = LOWEST if marks is None else _NOT_CHOSEN * logit_scale / 2
    row_sum = tl.where(row_max > nothing, row_sum, float("nan"))
    # Divide once per row and multiply: the compiler guards every division against quotients out of range.
    acc *= (1 / row_sum)[:, None]
    head_start = image * map_tokens * DIM + head * V_HEAD_DIM
    if results.attention is not None:
        store_rows(results.attention + head_start, own, v_channel, own >= 0, acc, DIM, V_HEAD_DIM)
    # Not `if lepe is not None`: Triton 3.4 cannot compare a group with None if one of its members is None.
    if CONFIG.LEPE_KERNEL > 0:
        sizes = (height, width, padded_height, padded_width)
        first_value = image * map_tokens * CONFIG.LEPE_STRIDE
        acc += _lepe_of_head(lepe, first_value, own, head, sizes, CONFIG)
    store_rows(results.out + head_start, own, v_channel, own >= 0, acc, DIM, V_HEAD_DIM)
    if results.lse is not None:
        lse_base = results.lse + (image * NUM_HEADS + head) * map_tokens
        tl.store(lse_base + own, row_max + tl.log2(row_sum), mask=own >= 0)
