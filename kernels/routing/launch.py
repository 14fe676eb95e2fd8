"""Launches of the routing kernels."""

import torch
from torch import Tensor

from ..grid import RegionGrid
from ..lib.integers import cdiv, next_power_of_2
from .arguments import MeansConfig, PairSumConfig, RouteConfig
from .lists import inverse_graph
from .route import region_means_kernel, route_kernel, sum_over_pairs_kernel

# Query regions of a program of `route`: the least that a matrix unit takes. Routing of BiFormer's third stage
# (batch 64) took 44 us on an H200 with products off the matrix units, and takes 13 with them.
_ROUTE_QUERIES = 16
# So many key regions fit shared memory as an operand; with more a query region has a program of its own.
_ROUTE_OPERAND = 256
# Elements of an operand, and the most channels in it: of 16, 32 and 64, timed by hand on an H200, the fastest
# for 49 and 64 regions.
_ROUTE_TILE, _ROUTE_CHANNELS = 4096, 64
# Elements of a tile of tokens, and the most tokens in it, of `region_means`. Regions of a few tokens, as in
# BiFormer's later stages, take tiles of more channels instead of dead rows: six tiles from 1 to 32 tokens,
# each compiled when first met. One warp a program, which has its loads in flight at once and nothing to wait
# for: on an H200 the means of BiFormer's second stage take 11 us, with four warps 34.
_MEANS_TILE, _MEANS_TOKENS = 2048, 32


def region_means(qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
    """Means over every region's tokens.

    Args:
        qkv: contiguous `(N, H, W, packed_dim)`; float32, float16 or bfloat16.
        padding: `(packed_dim,)`, what tokens past the map's edge hold; None to leave them out.
        grid: the regions; without `padding` each has a token of the map.
        channels: how many of the first channels to take.

    Returns:
        `(N, P, channels)` float32.
    """
    means = qkv.new_empty(qkv.shape[0], grid.n_regions, channels, dtype=torch.float32)
    if not qkv.shape[0]:
        return means
    block_tokens = min(_MEANS_TOKENS, next_power_of_2(grid.region_tokens))
    block_c = min(_MEANS_TILE // block_tokens, next_power_of_2(channels))
    with torch.cuda.device_of(qkv):
        region_means_kernel[(qkv.shape[0] * grid.n_regions, cdiv(channels, block_c))](
            *(qkv, padding, means),
            *(grid.region_height, grid.region_width, grid.columns, grid.height, grid.width, grid.n_regions),
            CONFIG=MeansConfig(channels, qkv.shape[-1], block_tokens, block_c),
            num_warps=1,
        )
    return means


def route(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Chooses the `topk` key regions of the largest logits for every query region.

    Args:
        query: `(N, P, qk_dim)` float32, region queries; rows may be slices of wider ones.
        key: `(N, P, qk_dim)` float32, region keys, strided alike.
        topk: regions to choose.
        scale: factor of the logits.

    Returns:
        `r_weight` (float32), the softmax over the chosen logits, and `r_idx` (int32), both `(N, P, topk)`.
    """
    batch, n_regions, dim = query.shape
    assert query.stride() == key.stride()
    r_weight = query.new_empty(batch, n_regions, topk)
    r_idx = torch.empty_like(r_weight, dtype=torch.int32)
    if not batch:
        return r_weight, r_idx
    block_r = max(16, next_power_of_2(n_regions))
    block_q = _ROUTE_QUERIES if block_r <= _ROUTE_OPERAND else 1
    block_c = max(1, min(_ROUTE_CHANNELS, _ROUTE_TILE // block_r))
    with torch.cuda.device_of(query):
        route_kernel[batch, cdiv(n_regions, block_q)](
            *(query, key, r_weight, r_idx, scale, n_regions, topk),
            CONFIG=RouteConfig(
                DIM=dim,
                ROW_STRIDE=_row_stride(query),
                BLOCK_Q=block_q,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                BLOCK_K=next_power_of_2(topk),
                PRECISION="ieee" if torch.version.hip else "tf32x3",
            ),
            num_warps=8 if block_r == _ROUTE_OPERAND else 4,  # with 4 it spills on sm_80
        )
    return r_weight, r_idx


def route_backward(
    grad_weight: Tensor, r_weight: Tensor, r_idx: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `route`'s query and key, `(N, P, qk_dim)` float32, for the gradient of `r_weight`."""
    batch, n_regions, topk = r_idx.shape
    grads = tuple(x.new_empty(x.shape) for x in (query, key))
    if not batch:
        return grads[0], grads[1]
    grad_logits = r_weight * (grad_weight - (r_weight * grad_weight).sum(-1, keepdim=True)) * scale
    row_start, pairs = inverse_graph(r_idx[:, None], n_regions)
    block_c = min(128, next_power_of_2(query.shape[-1]))
    grid = (batch * n_regions, cdiv(query.shape[-1], block_c))
    with torch.cuda.device_of(query):
        for own_pairs, source, grad in ((None, key, grads[0]), (pairs, query, grads[1])):
            sum_over_pairs_kernel[grid](
                *(r_idx, row_start, own_pairs, grad_logits.contiguous(), source, grad, n_regions, topk),
                CONFIG=PairSumConfig(query.shape[-1], _row_stride(source), block_c),
                num_warps=4,
            )
    return grads[0], grads[1]


def _row_stride(x: Tensor) -> int:
    """Elements from one region to the next; images must follow without a gap."""
    stride = x.stride(1) if x.shape[1] > 1 else x.stride(0)
    assert x.stride(2) == 1 or x.shape[2] == 1
    assert x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * stride
    return stride
