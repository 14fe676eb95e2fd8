"""Launches of the routing kernels, added to a plan."""

from dataclasses import dataclass

import torch

from ..arrays import Buffer
from ..grid import RegionGrid
from ..lib.integers import cdiv, next_power_of_2
from ..lib.precision import full_precision
from ..plan import Plan
from .arguments import Inverse, Lists, Marks, MeansConfig, RouteConfig, RoutingGradientConfig
from .gradient import key_routing_gradient_kernel, query_routing_gradient_kernel, spread_means_kernel
from .route import region_means_kernel, route_kernel

# Query regions of a program of `route_kernel`: the fewest rows that a matrix unit multiplies. On an H200 the
# routing of BiFormer's third stage takes 13 us; it took 44 us without matrix units (docs/kernel_times.md).
_ROUTE_QUERIES = 16
# `_ROUTE_OPERAND`: the most key regions that fit in shared memory as one operand; with more, the kernel
# processes them in blocks of this size. Between the blocks it keeps the choices so far in registers, at most
# `_ROUTE_KEPT` per query region; with a larger `topk`, each query region has its own program, which uses no
# matrix unit.
_ROUTE_OPERAND, _ROUTE_KEPT = 256, 256
# Elements of an operand, and the most channels in it. Of 16, 32 and 64 channels, 64 were the fastest on an
# H200, for 49 and 64 regions.
_ROUTE_TILE, _ROUTE_CHANNELS = 4096, 64
# Tokens that a program lists in one step, for all regions that its query regions chose: 16 per thread. With
# factors it lists half as many: for 128 channels and a padded map, compiled for sm_90, the kernel then takes
# 128 registers; with 2048 tokens it took 168 and spilled 4 instructions.
_LISTED, _LISTED_WITH_FACTORS = 2048, 1024
# Marks that a program writes in one step. With 2048 it spills 2 instructions on sm_80, at BiFormer's third
# stage.
_MARKED = 512
# Elements of a tile of `region_means_kernel`, and the most tokens in it. Regions of few tokens, as in
# BiFormer's later stages, get tiles with more channels instead of dead rows: there are six tiles, of 1 to 32
# tokens, and each is compiled at its first use. A program has only one warp: all its loads are in flight at
# once, and it waits for no other warp. On an H200 the means of BiFormer's second stage take 11 us, with four
# warps 34 us (docs/kernel_times.md).
_MEANS_TILE, _MEANS_TOKENS = 2048, 32


def launch_region_means(
    plan: Plan, qkv: Buffer, padding: Buffer | None, grid: RegionGrid, means: Buffer
) -> None:
    """Adds the launch that computes the means over every region's tokens.

    Args:
        plan: where to add it.
        qkv: contiguous `(N, H, W, packed_dim)`; float32, float16 or bfloat16.
        padding: `(packed_dim,)`, what tokens past the map's edge hold; None to leave these out of the means.
        grid: the regions; without `padding` each must contain a token of the map.
        means: where the means of the first `channels` channels go, `(N, P, channels)` float32.
    """
    config = _means_config(qkv, means, grid)
    plan.launch(
        region_means_kernel,
        (qkv.shape[0] * grid.n_regions, cdiv(config.MEAN_DIM, config.BLOCK_C)),
        (qkv, padding, means),
        (*grid.geometry, grid.n_regions, config),
        num_warps=1,
    )


def launch_spread_means(
    plan: Plan, grad_means: Buffer, grad_qkv: Buffer, grid: RegionGrid, counts_padding: bool
) -> None:
    """Adds the launch that adds to `grad_qkv`, in place, the gradient that it gets from the means.

    `grad_means` is the gradient of the means, `(N, P, channels)` float32.
    """
    config = _means_config(grad_qkv, grad_means, grid)._replace(COUNTS_PADDING=counts_padding)
    plan.launch(
        spread_means_kernel,
        (grad_qkv.shape[0] * grid.n_regions, cdiv(config.MEAN_DIM, config.BLOCK_C)),
        (grad_means, grad_qkv),
        (*grid.geometry, grid.n_regions, config),
        num_warps=1,
    )


@dataclass(frozen=True)
class Routing:
    """Region queries and keys, and the arrays for the choice.

    Attributes:
        query: `(N, P, qk_dim)` float32; rows may be slices of wider rows.
        key: likewise, with the strides of `query`.
        r_weight: `(N, P, topk)` float32; None if it is not needed.
        r_idx: `(N, P, topk)` int32.
        scale: factor of the logits.
    """

    query: Buffer
    key: Buffer
    r_weight: Buffer | None
    r_idx: Buffer
    scale: float


def launch_route(
    plan: Plan,
    routing: Routing,
    lists: Lists | None = None,
    marks: Marks | None = None,
    grid: RegionGrid | None = None,
) -> None:
    """Adds the launch that chooses the key regions with the largest logits for every query region.

    Args:
        plan: where to add it.
        routing: the region queries and keys, and where the choice goes.
        lists: lists that the launch also writes: the tokens of all regions and, unless `lists.token_list` is
            None, the tokens of the chosen regions. None to write no list.
        marks: marks that the launch also writes, the choice as a mask. With `lists`, which then holds only
            the region list, tokens are in the order of that list, else in the map's order. None to write no
            marks.
        grid: the regions of both keys and queries; needed with `lists` or `marks`.
    """
    batch, n_regions, topk = routing.r_idx.shape
    block_r, block_k = max(16, next_power_of_2(n_regions)), next_power_of_2(topk)
    in_blocks = block_r > _ROUTE_OPERAND and block_k <= _ROUTE_KEPT
    if in_blocks:
        block_r = _ROUTE_OPERAND
    block_q = _ROUTE_QUERIES if block_r <= _ROUTE_OPERAND else 1
    listed = _LISTED if lists is None or lists.factors is None else _LISTED_WITH_FACTORS
    config = RouteConfig(
        DIM=routing.query.shape[-1],
        ROW_STRIDE=region_stride(routing.query),
        BLOCK_Q=block_q,
        BLOCK_R=block_r,
        BLOCK_C=max(1, min(_ROUTE_CHANNELS, _ROUTE_TILE // block_r)),
        BLOCK_K=block_k,
        PRECISION=full_precision(),
        IN_BLOCKS=in_blocks,
        LISTS=lists is not None,
        BLOCK_TOKENS=max(1, listed // (block_q * block_k)),
        BLOCK_REGION_TOKENS=_LISTED // block_q,
        BLOCK_MARKED=max(1, _MARKED // block_r),
    )
    assert marks is None or marks.key_marks.shape[-1] == block_r
    plan.launch(
        route_kernel,
        (batch, cdiv(n_regions, block_q)),
        (routing.query, routing.key, routing.r_weight, routing.r_idx, lists, marks),
        (routing.scale, n_regions, topk, *(grid.geometry if grid else (1,) * 5), config),
        num_warps=8 if block_r == _ROUTE_OPERAND else 4,  # with 4 it spills on sm_80
    )


def launch_route_gradient(
    plan: Plan, routing: Routing, shares: Buffer, inverse: Inverse, grad_query: Buffer, grad_key: Buffer
) -> None:
    """Adds the launches that compute the gradients of region queries and keys.

    Args:
        plan: where to add them.
        routing: the forward's.
        shares: `(N, heads, P, tiles, topk)` float32: shares of the gradient of `r_weight`.
        inverse: the inverse graph.
        grad_query: where the queries' gradient goes, `(N, P, qk_dim)` float32; rows may be slices of wider
            rows.
        grad_key: where the keys' gradient goes, likewise, with the strides of `grad_query`.
    """
    batch, n_regions, topk = routing.r_idx.shape
    dim = routing.query.shape[-1]
    block_c = min(128, next_power_of_2(dim))
    grid = (batch * n_regions, cdiv(dim, block_c))
    config = RoutingGradientConfig(
        dim, region_stride(routing.query), region_stride(grad_query), next_power_of_2(topk), block_c
    )
    grad_logits = plan.scratch(routing.r_idx.shape, torch.float32)
    plan.launch(
        query_routing_gradient_kernel,
        grid,
        (shares, routing.r_weight, routing.r_idx, routing.key, grad_logits, grad_query),
        (routing.scale, n_regions, topk, shares.shape[1], shares.shape[3], config),
        num_warps=4,
    )
    plan.launch(
        key_routing_gradient_kernel,
        grid,
        (inverse.row_start, inverse.pairs, grad_logits, routing.query, grad_key),
        (n_regions, topk, config),
        num_warps=4,
    )


def _means_config(qkv: Buffer, means: Buffer, grid: RegionGrid) -> MeansConfig:
    channels = means.shape[-1]
    block_tokens = min(_MEANS_TOKENS, next_power_of_2(grid.region_tokens))
    block_c = min(_MEANS_TILE // block_tokens, next_power_of_2(channels))
    return MeansConfig(channels, qkv.shape[-1], block_tokens, block_c)


def region_stride(x: Buffer) -> int:
    """Elements from one region's row to the next; there must be no gap between images."""
    of_image, stride, of_channel = x.stride()
    assert of_channel == 1 or x.shape[2] == 1
    assert x.shape[0] == 1 or x.shape[1] == 1 or of_image == x.shape[1] * stride
    return stride if x.shape[1] > 1 else of_image
