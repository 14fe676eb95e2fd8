"""Gradient of the routing: of the region queries and keys, and of the map whose means they are.

| array | shape | meaning |
|---|---|---|
| shares | (N, HEADS, P, TILES, TOPK) fp32 | shares of the routing weights' gradient, summed here |
| r_weight, r_idx | (N, P, TOPK) | routing weights and chosen regions, from the forward |
| row_start, pairs | | the inverse graph, see `graph` |
| grad_logits | (N, P, TOPK) fp32 | gradient of the chosen regions' logits |
| query, key | (N, P, DIM) fp32 | region queries and keys, rows ROW_STRIDE apart |
| grad_query, grad_key | (N, P, DIM) fp32 | their gradients, rows GRAD_STRIDE apart |
| grad_qkv | (N, H, W, PACKED) | gradient of the packed projection, added to in place |
"""

import triton
import triton.language as tl

from ..lib.addressing import corner_of, token_of


@triton.jit(do_not_specialize=["n_regions", "topk", "n_heads", "tiles"])
def query_routing_gradient_kernel(
    shares,
    r_weight,
    r_idx,
    key,
    grad_logits,
    grad_query,
    scale,
    n_regions,
    topk,
    n_heads,
    tiles,
    CONFIG: tl.constexpr,
):
    """Gradient of one region's query and of its logits; grid (N * P, blocks of channels)."""
    region = tl.program_id(0) % n_regions
    image = (tl.program_id(0) // n_regions).to(tl.int64)
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    slot = tl.arange(0, BLOCK_K)
    chosen = slot < topk
    own = (image * n_regions + region) * topk + slot
    grad_weight = tl.zeros([BLOCK_K], tl.float32)
    for head in tl.range(0, n_heads):
        for tile in tl.range(0, tiles):
            row = ((image * n_heads + head) * n_regions + region) * tiles + tile
            grad_weight += tl.load(shares + row * topk + slot, mask=chosen, other=0.0)
    weight = tl.load(r_weight + own, mask=chosen, other=0.0)
    of_logits = weight * (grad_weight - tl.sum(weight * grad_weight, axis=0)) * scale
    if tl.program_id(1) == 0:
        tl.store(grad_logits + own, of_logits, mask=chosen)

    channel = tl.program_id(1) * CONFIG.BLOCK_C + tl.arange(0, CONFIG.BLOCK_C)
    live = channel < CONFIG.DIM
    other = tl.load(r_idx + own, mask=chosen, other=0)
    rows = key + (image * n_regions + other)[:, None] * CONFIG.ROW_STRIDE + channel[None, :]
    keys = tl.load(rows, mask=chosen[:, None] & live[None, :], other=0.0)
    grad = tl.sum(of_logits[:, None] * keys, axis=0)
    tl.store(grad_query + (image * n_regions + region) * CONFIG.GRAD_STRIDE + channel, grad, mask=live)


@triton.jit(do_not_specialize=["n_regions", "topk"])
def key_routing_gradient_kernel(
    row_start,
    pairs,
    grad_logits,
    query,
    grad_key,
    n_regions,
    topk,
    CONFIG: tl.constexpr,
):
    """Gradient of one region's key, summed over its row of pairs, in order; grid (N * P, channel blocks)."""
    region = tl.program_id(0) % n_regions
    image = (tl.program_id(0) // n_regions).to(tl.int64)
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < CONFIG.DIM
    n_pairs = n_regions * topk
    row = row_start + image * (n_regions + 1) + region
    total = tl.zeros([BLOCK_C], tl.float32)
    for index in tl.range(tl.load(row), tl.load(row + 1)):
        pair = tl.load(pairs + image * n_pairs + index)
        weight = tl.load(grad_logits + image * n_pairs + pair)
        other = image * n_regions + pair // topk
        total += weight * tl.load(query + other * CONFIG.ROW_STRIDE + channel, mask=live, other=0.0)
    tl.store(grad_key + (image * n_regions + region) * CONFIG.GRAD_STRIDE + channel, total, mask=live)


@triton.jit(do_not_specialize=["region_height", "region_width", "columns", "height", "width", "n_regions"])
def spread_means_kernel(
    grad_means,
    grad_qkv,
    region_height,
    region_width,
    columns,
    height,
    width,
    n_regions,
    CONFIG: tl.constexpr,
):
    """Adds to every token of a region its share of the gradient of the region's mean.

    Grid (N * P, blocks of channels); `CONFIG` as for `region_means_kernel`, with COUNTS_PADDING.
    """
    region_tokens = region_height * region_width
    region = tl.program_id(0) % n_regions
    image = (tl.program_id(0) // n_regions).to(tl.int64)
    channel = tl.program_id(1) * CONFIG.BLOCK_C + tl.arange(0, CONFIG.BLOCK_C)
    live = channel < CONFIG.MEAN_DIM
    counted = region_tokens
    if not CONFIG.COUNTS_PADDING:
        top, left = corner_of(region, region_height, region_width, columns)
        counted = tl.minimum(region_height, height - top) * tl.minimum(region_width, width - left)
    row = grad_means + (image * n_regions + region) * CONFIG.MEAN_DIM + channel
    share = tl.load(row, mask=live, other=0.0) / counted
    for start in tl.range(0, region_tokens, CONFIG.BLOCK_TOKENS):
        index = start + tl.arange(0, CONFIG.BLOCK_TOKENS)
        token = token_of(region, index, region_height, region_width, columns, height, width)
        inside = (index < region_tokens) & (token >= 0)
        tokens = grad_qkv + (image * height * width + token)[:, None] * CONFIG.PACKED + channel[None, :]
        mask = inside[:, None] & live[None, :]
        grad = tl.load(tokens, mask=mask, other=0.0).to(tl.float32) + share[None, :]
        tl.store(tokens, grad.to(grad_qkv.dtype.element_ty), mask=mask)
