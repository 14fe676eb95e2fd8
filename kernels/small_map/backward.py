"""Backward of a small map in one launch: half of the programs own the queries of a region, half its keys.

Both halves read the choices of the forward. A program that owns keys searches the choices of all regions for
its own region, so no inverse graph is stored in memory. Nothing is added atomically.

| array | shape | meaning |
|---|---|---|
| maps, padding, saved | | as in `attention.query_gradient` |
| choices | | the regions that each region chose, see `Choices` |
| results | | where gradients go, see `SmallMapGradients` |
"""

import triton
import triton.language as tl

from ..lib.matrix import add_matmul, matmul
from .tokens import (
    chosen,
    has_tokens,
    keys_of,
    listed_tokens,
    load_heads,
    load_keys_values,
    load_queries,
    locate,
    own_tokens,
    store_heads,
    transposed,
)


@triton.jit
def _statistics(saved, image, map_tokens, token, live, head, CONFIG: tl.constexpr):
    """dO (heads, tokens, channels), delta and lse (heads, tokens) of the queries `token`.

    The softmax's gradient needs them. lse is infinite where not `live`, so that probabilities are 0 there.
    """
    DIM: tl.constexpr = CONFIG.NUM_HEADS * CONFIG.V_HEAD_DIM
    first = image * map_tokens * DIM
    grad_out = load_heads(
        saved.grad_out + first, None, token, live, head, DIM, CONFIG.V_HEAD_DIM, CONFIG.BLOCK_V
    )
    out = load_heads(saved.out + first, None, token, live, head, DIM, CONFIG.V_HEAD_DIM, CONFIG.BLOCK_V)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=2)
    lse_rows = saved.lse + (image * CONFIG.NUM_HEADS + head[:, None]) * map_tokens
    lse = tl.load(lse_rows + token[None, :], mask=live[None, :], other=float("inf"))
    return grad_out, delta, lse


@triton.jit
def _query_gradient(
    maps, padding, saved, choices, results, where, scales, sizes, grid, kv_grid, CONFIG: tl.constexpr
):
    """Gradient of the queries of one region."""
    HEADS: tl.constexpr = CONFIG.HEADS
    BLOCK_OWN: tl.constexpr = CONFIG.BLOCK_OWN
    BLOCK_QK: tl.constexpr = CONFIG.BLOCK_QK
    PRECISION: tl.constexpr = CONFIG.PRECISION
    image, region, head = where
    logit_scale, scale = scales
    topk, n_regions, map_tokens, kv_tokens = sizes
    own, _ = own_tokens(region, grid, CONFIG.BLOCK_OWN)
    in_map = own >= 0
    q = load_queries(maps, image, map_tokens, own, in_map, head, CONFIG)
    grad_out, delta, lse = _statistics(saved, image, map_tokens, own, in_map, head, CONFIG)
    regions, weight = chosen(choices, image, region, topk, n_regions, CONFIG)
    grad = tl.zeros([HEADS, BLOCK_OWN, BLOCK_QK], tl.float32)
    for start in tl.range(0, keys_of(region, topk, grid, kv_grid, CONFIG), CONFIG.BLOCK_STEP):
        token, live, of_slot = listed_tokens(regions, topk, start, kv_grid, CONFIG.BLOCK_STEP)
        k, v = load_keys_values(maps, padding, image, kv_tokens, token, live, head, CONFIG)
        scores = matmul(q, transposed(k), PRECISION) * logit_scale
        grad_probs = matmul(grad_out, transposed(v), PRECISION)
        if CONFIG.IS_SOFT:
            factor = tl.gather(weight, of_slot, 0)[None, None, :]
            scores *= factor
            grad_probs *= factor
        probs = tl.where(live[None, None, :], tl.exp2(scores - lse[:, :, None]), 0.0)
        grad_scores = probs * (grad_probs - delta[:, :, None])
        if CONFIG.IS_SOFT:
            grad_scores *= factor
        grad = add_matmul(grad, grad_scores, k, PRECISION)
    store_heads(
        results.query + image * map_tokens * CONFIG.GRAD_QUERY_STRIDE,
        own,
        in_map,
        head,
        grad * scale,
        CONFIG.GRAD_QUERY_STRIDE,
        CONFIG.QK_HEAD_DIM,
    )


@triton.jit
def _choosers(choices, image, region, topk, n_regions, grid, CONFIG: tl.constexpr):
    """The regions that chose `region`, without those whose queries are all padding, as in `routing.graph`.

    Returns their numbers in ascending order, followed by zeros, (BLOCK_P,); how many there are; and for each
    of them the factor of `region`'s keys and values, (BLOCK_P,).
    """
    BLOCK_P: tl.constexpr = CONFIG.BLOCK_P
    key_region = tl.arange(0, BLOCK_P)
    slot = tl.arange(0, CONFIG.BLOCK_K)
    slots = (image * n_regions + key_region[:, None]) * topk + slot[None, :]
    chooses = key_region < n_regions
    if CONFIG.QUERY_IS_PADDED:
        chooses = chooses & has_tokens(key_region, grid)
    mask = chooses[:, None] & (slot < topk)[None, :]
    chose = tl.load(choices.r_idx + slots, mask=mask, other=-1) == region
    is_chooser = tl.sum(chose.to(tl.int32), axis=1)
    place = tl.cumsum(is_chooser, axis=0) - 1
    in_place = (place[:, None] == key_region[None, :]) & (is_chooser > 0)[:, None]
    regions = tl.sum(tl.where(in_place, key_region[:, None], 0), axis=0)
    factor = tl.zeros([BLOCK_P], tl.float32)  # Triton functions cannot return None together with tensors
    if CONFIG.IS_SOFT:
        weight = tl.load(choices.r_weight + slots, mask=mask, other=0.0)
        weight = tl.sum(tl.where(chose, weight, 0.0), axis=1)
        factor = tl.sum(tl.where(in_place, weight[:, None], 0.0), axis=0)
    return regions, tl.sum(is_chooser, axis=0), factor


@triton.jit
def _key_value_gradient(
    maps, padding, saved, choices, results, where, scales, sizes, grid, kv_grid, CONFIG: tl.constexpr
):
    """Gradients of the keys and values of one region, and its share of the padding's gradients."""
    HEADS: tl.constexpr = CONFIG.HEADS
    BLOCK_OWN: tl.constexpr = CONFIG.BLOCK_OWN
    BLOCK_QK: tl.constexpr = CONFIG.BLOCK_QK
    PRECISION: tl.constexpr = CONFIG.PRECISION
    BLOCK_V: tl.constexpr = CONFIG.BLOCK_V
    image, region, head = where
    logit_scale, scale = scales
    topk, n_regions, map_tokens, kv_tokens = sizes
    own, exists = own_tokens(region, kv_grid, CONFIG.BLOCK_OWN)
    in_map = own >= 0
    live_own = in_map if padding is None else exists
    k, v = load_keys_values(maps, padding, image, kv_tokens, own, live_own, head, CONFIG)
    regions, n_choosers, weight = _choosers(choices, image, region, topk, n_regions, grid, CONFIG)
    grad_key = tl.zeros([HEADS, BLOCK_OWN, BLOCK_QK], tl.float32)
    grad_value = tl.zeros([HEADS, BLOCK_OWN, BLOCK_V], tl.float32)
    for start in tl.range(0, n_choosers * grid[0] * grid[1], CONFIG.BLOCK_STEP):
        token, live, of_slot = listed_tokens(regions, n_choosers, start, grid, CONFIG.BLOCK_STEP)
        live = token >= 0
        q = load_queries(maps, image, map_tokens, token, live, head, CONFIG)
        grad_out, delta, lse = _statistics(saved, image, map_tokens, token, live, head, CONFIG)
        scores = matmul(k, transposed(q), PRECISION) * logit_scale
        grad_probs = matmul(v, transposed(grad_out), PRECISION)
        if CONFIG.IS_SOFT:
            factor = tl.gather(weight, of_slot, 0)[None, None, :]
            scores *= factor
            grad_probs *= factor
        probs = tl.exp2(scores - lse[:, None, :])
        grad_scores = probs * (grad_probs - delta[:, None, :])
        if CONFIG.IS_SOFT:
            grad_scores *= factor
            probs *= factor
        grad_value = add_matmul(grad_value, probs, grad_out, PRECISION)
        grad_key = add_matmul(grad_key, grad_scores, q, PRECISION)
    grad_key *= scale
    store_heads(
        results.key + image * kv_tokens * CONFIG.GRAD_KEY_STRIDE,
        own,
        in_map,
        head,
        grad_key,
        CONFIG.GRAD_KEY_STRIDE,
        CONFIG.QK_HEAD_DIM,
    )
    store_heads(
        results.value + image * kv_tokens * CONFIG.GRAD_VALUE_STRIDE,
        own,
        in_map,
        head,
        grad_value,
        CONFIG.GRAD_VALUE_STRIDE,
        CONFIG.V_HEAD_DIM,
    )
    if results.padding is not None:
        is_padding = (exists & ~in_map)[None, :, None]
        share = results.padding + ((image * CONFIG.NUM_HEADS + head) * n_regions + region)[:, None] * (
            CONFIG.QK_HEAD_DIM + CONFIG.V_HEAD_DIM
        )
        channel = tl.arange(0, CONFIG.BLOCK_QK)[None, :]
        of_key = tl.sum(tl.where(is_padding, grad_key, 0.0), axis=1)
        tl.store(share + channel, of_key, mask=channel < CONFIG.QK_HEAD_DIM)
        channel = tl.arange(0, CONFIG.BLOCK_V)[None, :]
        of_value = tl.sum(tl.where(is_padding, grad_value, 0.0), axis=1)
        tl.store(share + CONFIG.QK_HEAD_DIM + channel, of_value, mask=channel < CONFIG.V_HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        *("topk", "n_regions", "region_height", "region_width", "columns", "height", "width"),
        *("kv_region_height", "kv_region_width", "kv_height", "kv_width"),
        *("of_tokens", "of_width", "of_kv_tokens", "of_kv_width", "of_columns"),
    ]
)
def small_map_backward_kernel(
    maps,
    choices,
    padding,
    saved,
    results,
    logit_scale,
    scale,
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
    """Gradients of one region and HEADS heads: of queries in even programs, of keys and values in odd ones.

    The numbers `of_...` are inverses, see `tokens`.
    """
    image, region, first_head = locate(tl.program_id(0) // 2, n_regions, CONFIG)
    where = (image, region, first_head + tl.arange(0, CONFIG.HEADS))
    scales = (logit_scale, scale)
    sizes = (topk, n_regions, height * width, kv_height * kv_width)
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
    if tl.program_id(0) % 2 == 0:
        _query_gradient(maps, padding, saved, choices, results, where, scales, sizes, grid, kv_grid, CONFIG)
    else:
        _key_value_gradient(
            maps, padding, saved, choices, results, where, scales, sizes, grid, kv_grid, CONFIG
        )
