"""Region-level routing: means of the regions' queries and keys, logits and top-k in one pass, inverse graph.

| array | shape | meaning |
|---|---|---|
| qkv | (N, H, W, 2*QK_DIM + DIM) | packed projection |
| means | (N, P, 2*QK_DIM) fp32 | region queries, then region keys |
| r_weight | (N, P, TOPK) fp32 | softmax over the chosen logits, descending |
| r_idx | (N, P, TOPK) int32 | chosen regions, by descending logit, equal ones by ascending index |
| row_start | (N, P + 1) int32 | compressed rows of the inverse graph: where each key region's row starts |
| choosers | (N, P * TOPK) int32 | the inverse graph: query regions, ascending in each row |
"""

import triton
import triton.language as tl

from .addressing import tokens_of_tile


@triton.jit(do_not_specialize=["region_height", "region_width"])
def region_means(
    qkv,
    means,
    region_height,
    region_width,
    N_WIN: tl.constexpr,
    MEAN_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Means over a region's tokens of BLOCK_C of the first MEAN_DIM packed channels; grid (N*P, blocks)."""
    N_REGIONS: tl.constexpr = N_WIN * N_WIN
    region_tokens = region_height * region_width
    region = tl.program_id(0) % N_REGIONS
    image = (tl.program_id(0) // N_REGIONS).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_live = channel < MEAN_DIM
    base = qkv + image * N_REGIONS * region_tokens * PACKED

    total = tl.zeros([BLOCK_TOKENS, BLOCK_C], tl.float32)
    for tile in tl.range(0, tl.cdiv(region_tokens, BLOCK_TOKENS)):
        _, live, token = tokens_of_tile(tile, region, region_height, region_width, N_WIN, BLOCK_TOKENS)
        rows = base + token[:, None] * PACKED + channel[None, :]
        total += tl.load(rows, mask=live[:, None] & channel_live[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / region_tokens
    tl.store(means + (image * N_REGIONS + region) * MEAN_DIM + channel, mean, mask=channel_live)


@triton.jit
def route(
    means,
    r_weight,
    r_idx,
    scale,
    N_REGIONS: tl.constexpr,
    TOPK: tl.constexpr,
    QK_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of one query region against all key regions, and the TOPK largest; grid (N*P,)."""
    pid = tl.program_id(0)
    image = (pid // N_REGIONS).to(tl.int64)
    key_region = tl.arange(0, BLOCK_R)
    key_rows = means + image * N_REGIONS * (2 * QK_DIM) + QK_DIM + key_region[:, None] * (2 * QK_DIM)
    query_row = means + pid.to(tl.int64) * (2 * QK_DIM)

    logits = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.range(0, QK_DIM, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        live = channel < QK_DIM
        query = tl.load(query_row + channel, mask=live, other=0.0) * scale
        key = tl.load(
            key_rows + channel[None, :], mask=(key_region < N_REGIONS)[:, None] & live[None, :], other=0.0
        )
        logits += tl.sum(key * query[None, :], axis=1)
    # NaN first, as torch.sort has it. Above all it must not yield an index out of range: a model whose
    # training diverges should report a NaN loss, not an illegal memory access.
    logits = tl.where(logits == logits, logits, float("inf"))

    free = key_region < N_REGIONS
    slot = tl.arange(0, BLOCK_K)
    top_logits = tl.full([BLOCK_K], float("-inf"), tl.float32)
    top_regions = tl.zeros([BLOCK_K], tl.int32)
    for taken in tl.range(0, TOPK):
        largest = tl.max(tl.where(free, logits, float("-inf")), axis=0)
        winner = tl.min(tl.where(free & (logits == largest), key_region, BLOCK_R), axis=0)
        free = free & (key_region != winner)
        top_logits = tl.where(slot == taken, largest, top_logits)
        top_regions = tl.where(slot == taken, winner, top_regions)

    weight = tl.exp(top_logits - tl.max(top_logits, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    row = pid.to(tl.int64) * TOPK + slot
    tl.store(r_weight + row, weight, mask=slot < TOPK)
    tl.store(r_idx + row, top_regions, mask=slot < TOPK)


@triton.jit
def invert_graph(
    r_idx,
    row_start,
    choosers,
    N_REGIONS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row of one key region: who chose it, ascending, and where the row starts; grid (N*P,).

    A stable counting sort without atomics: every program counts the choices of smaller regions to find its
    row's start, then writes its own in order. All programs of an image read 2*P*P*TOPK numbers: 19 thousand
    at 49 regions and topk 4, a billion at 4096 regions and topk 32, where a sort would be due.
    """
    region = tl.program_id(0) % N_REGIONS
    image = (tl.program_id(0) // N_REGIONS).to(tl.int64)
    choices = r_idx + image * (N_REGIONS * TOPK)
    start = 0
    for first in tl.range(0, N_REGIONS * TOPK, BLOCK):
        index = first + tl.arange(0, BLOCK)
        choice = tl.load(choices + index, mask=index < N_REGIONS * TOPK, other=N_REGIONS)
        start += tl.sum((choice < region).to(tl.int32), axis=0)
    tl.store(row_start + image * (N_REGIONS + 1) + region, start)
    if region == N_REGIONS - 1:
        tl.store(row_start + image * (N_REGIONS + 1) + N_REGIONS, N_REGIONS * TOPK)

    next_free = choosers + image * (N_REGIONS * TOPK) + start
    for first in tl.range(0, N_REGIONS * TOPK, BLOCK):
        index = first + tl.arange(0, BLOCK)
        choice = tl.load(choices + index, mask=index < N_REGIONS * TOPK, other=N_REGIONS)
        chosen = (choice == region).to(tl.int32)
        tl.store(next_free + tl.cumsum(chosen, axis=0) - 1, index // TOPK, mask=chosen != 0)
        next_free += tl.sum(chosen, axis=0)
