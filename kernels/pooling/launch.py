"""Plans of pooling and of its gradients, and the launches of which they consist."""

import torch
from torch import Tensor

from ..arrays import Array, Buffer
from ..lib.integers import cdiv, next_power_of_2
from ..lib.maps import row_stride
from ..plan import Plan
from .arguments import Cells, Holders, InvertConfig, PoolingConfig, Taps
from .cells import invert_cells_kernel, pool_backward_kernel, pool_kernel, pool_weight_gradient_kernel
from .problem import MAX, RegionPooling

# Bytes of a tile: two 16-byte loads per thread are in flight. The choice is predicted, not measured. With
# twice as many bytes the float32 kernels spill.
TILE_BYTES = 4096
MAX_BLOCK_CHANNELS = 64
NUM_WARPS = 4
# The most strips over which a sum is divided; more strips would only make their shares take more memory.
MAX_STRIPS = 1024


Inputs = tuple[Tensor | None, ...]


def pooling_inputs(
    x: Tensor,
    fill: Tensor | None,
    pooling: RegionPooling[Tensor],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> Inputs:
    """The tensors of a pooling, described at `FusedKernels.pool`, in the form and order of the plans' inputs.

    If one tensor holds the cells of both axes, it is among the inputs only once: the columns' place is None.
    """
    rows, columns = pooling.row_cells, pooling.column_cells
    return (
        x,
        fill if pooling.grid.is_padded else None,
        rows,
        None if columns is rows else columns,
        None if weight is None else weight.permute(1, 2, 0).float().contiguous(),
        None if bias is None else bias.float(),
    )


def plan_pool(inputs: Inputs, pooling: RegionPooling[Tensor]) -> Plan:
    """Plan of the forward.

    Its inputs are `pooling_inputs`. Its outputs are the pooled map and, for `MAX`, the index of the token
    that each element was taken from.
    """
    plan = Plan(inputs, pooling.row_cells.device)
    x, fill, cells, weight, bias = _buffers(plan, pooling)
    grid = pooling.pooled_grid
    pooled = plan.output((x.shape[0], grid.height, grid.width, x.shape[-1]), x.dtype)
    argmax = plan.output(pooled.shape, torch.int32) if pooling.mode == MAX else None
    taps = None if weight is None or bias is None else Taps(weight, bias)
    launch_pool(plan, x, fill, cells, taps, pooled, argmax)
    return plan


def plan_pool_backward(inputs: Inputs, pooling: RegionPooling[Tensor]) -> Plan:
    """Plan of the backward.

    Its inputs are `pooling_inputs`, then `grad_pooled`, the forward's `argmax`, and `grad_x`, which it
    writes. Its outputs are the shares of the gradient of `fill`, if the grid is padded, and those of the
    weight's gradient, if there is a weight.
    """
    plan = Plan(inputs, pooling.row_cells.device)
    x, fill, cells, weight, _ = _buffers(plan, pooling)
    grad_pooled, argmax, grad_x = plan.inputs[6:]
    assert grad_pooled is not None
    assert grad_x is not None
    launch_pool_gradient(plan, grad_pooled, argmax, cells, weight, grad_x)
    if weight is not None:
        launch_pool_weight_gradient(plan, grad_pooled, x, fill, cells, weight)
    return plan


def _buffers(
    plan: Plan, pooling: RegionPooling[Tensor]
) -> tuple[Buffer, Buffer | None, RegionPooling[Buffer], Buffer | None, Buffer | None]:
    x, fill, rows, columns, weight, bias = plan.inputs[:6]
    assert x is not None
    assert rows is not None
    return x, fill, RegionPooling(rows, columns or rows, pooling.mode, pooling.grid), weight, bias


def launch_pool(
    plan: Plan,
    x: Buffer,
    fill: Buffer | None,
    pooling: RegionPooling[Buffer],
    taps: Taps | None,
    pooled: Buffer,
    argmax: Buffer | None,
) -> None:
    """Adds the launch that reduces every region's tokens to cells.

    Args:
        plan: where to add it.
        x: `(N, H, W, C)` under `pooling.grid`; float32, float16 or bfloat16. A channel slice of a contiguous
            map.
        fill: `(C,)`, what tokens past the map's edge hold; None where the grid is not padded.
        pooling: the cells and how they are reduced.
        taps: weight and bias of the convolution, for `WEIGHTED`; else None.
        pooled: where the pooled map goes, `(N, rows*h', columns*w', C)` of the dtype of `x`.
        argmax: for `MAX`, of the shape of `pooled`, int32: where to write, for each element, the index in its
            region of the token that it was taken from. Else None.
    """
    grid, config = pooling.pooled_grid, _config(x, pooling, None if taps is None else taps.weight)
    plan.launch(
        pool_kernel,
        (x.shape[0] * cdiv(grid.height * grid.width, config.BLOCK_T), _channel_blocks(config)),
        (x, fill, taps, _cells(pooling), pooled, argmax),
        (*_sizes(pooling), config),
        num_warps=NUM_WARPS,
    )


def launch_pool_gradient(
    plan: Plan,
    grad_pooled: Buffer,
    argmax: Buffer | None,
    pooling: RegionPooling[Buffer],
    weight: Buffer | None,
    grad_x: Buffer,
) -> None:
    """Adds the launches that compute the gradient of the map; every element is written once.

    If the grid is padded, shares of the gradient of `fill`, `(programs, C)` float32, become an output of
    the plan.

    Args:
        plan: where to add them.
        grad_pooled: `(N, rows*h', columns*w', C)`, contiguous.
        argmax: the forward's.
        pooling: the forward's.
        weight: the weight of the forward's `taps`; None without them.
        grad_x: where the gradient goes, `(N, H, W, C)` with the strides of `x`.
    """
    grid, config = pooling.grid, _config(grad_x, pooling, weight)
    strips, strip_tiles = _strips(cdiv(grid.n_regions * grid.region_tokens, config.BLOCK_T))
    programs, partials = grad_x.shape[0] * strips, None
    if grid.is_padded:
        partials = plan.output((programs, config.CHANNELS), torch.float32)
    plan.launch(
        pool_backward_kernel,
        (programs, _channel_blocks(config)),
        (grad_pooled, argmax, weight, _cells(pooling), _launch_holders(plan, pooling), grad_x, partials),
        (*_sizes(pooling), strips, strip_tiles, config),
        num_warps=NUM_WARPS,
    )


def launch_pool_weight_gradient(
    plan: Plan,
    grad_pooled: Buffer,
    x: Buffer,
    fill: Buffer | None,
    pooling: RegionPooling[Buffer],
    weight: Buffer,
) -> None:
    """Adds the launch that computes shares of the weight's gradient.

    The shares, `(strips, taps, C)` float32, become an output of the plan.
    """
    config, pooled = _config(x, pooling, weight), pooling.pooled_grid
    tiles = x.shape[0] * cdiv(pooled.height * pooled.width, config.BLOCK_T)
    strips, strip_tiles = _strips(tiles)
    taps = weight.shape[0] * weight.shape[1]
    partials = plan.output((strips, taps, config.CHANNELS), torch.float32)
    plan.launch(
        pool_weight_gradient_kernel,
        (strips, _channel_blocks(config), taps),
        (grad_pooled, x, fill, _cells(pooling), partials),
        (*_sizes(pooling), tiles, strip_tiles, config),
        num_warps=NUM_WARPS,
    )


def _cells(pooling: RegionPooling[Buffer]) -> Cells:
    return Cells(pooling.row_cells, pooling.column_cells)


def _launch_holders(plan: Plan, pooling: RegionPooling[Buffer]) -> Holders:
    """The cells that contain each token; one table for both axes if their cells and sides are the same."""
    grid = pooling.grid
    rows = columns = _launch_inversion(plan, pooling.row_cells, grid.region_height)
    if pooling.column_cells != pooling.row_cells or grid.region_width != grid.region_height:
        columns = _launch_inversion(plan, pooling.column_cells, grid.region_width)
    return Holders(rows, columns)


def _launch_inversion(plan: Plan, cells: Buffer, side: int) -> Buffer:
    holders = plan.scratch((side, 2), torch.int32)
    config = InvertConfig(BLOCK=32, BLOCK_CELLS=32)
    plan.launch(
        invert_cells_kernel,
        (cdiv(side, config.BLOCK),),
        (cells, holders),
        (cells.shape[0], side, config),
        num_warps=1,
    )
    return holders


def _config(x: Array, pooling: RegionPooling[Buffer], weight: Buffer | None) -> PoolingConfig:
    channels = x.shape[-1]
    block_c = min(MAX_BLOCK_CHANNELS, next_power_of_2(channels))
    return PoolingConfig(
        MODE=pooling.mode,
        KERNEL_WIDTH=1 if weight is None else weight.shape[1],
        TOKEN_STRIDE=row_stride(x),
        CHANNELS=channels,
        BLOCK_T=TILE_BYTES // (x.dtype.itemsize * block_c),
        BLOCK_C=block_c,
    )


def _sizes(pooling: RegionPooling[Buffer]) -> tuple[int, ...]:
    """Run-time numbers that all pooling kernels take."""
    grid = pooling.grid
    return (
        *(grid.height, grid.width, grid.region_height, grid.region_width, grid.rows, grid.columns),
        *(pooling.cells_high, pooling.cells_wide),
    )


def _channel_blocks(config: PoolingConfig) -> int:
    return cdiv(config.CHANNELS, config.BLOCK_C)


def _strips(tiles: int) -> tuple[int, int]:
    """Number of strips into which `tiles` tiles are divided, and number of tiles in a strip."""
    strip_tiles = cdiv(tiles, MAX_STRIPS)
    return (cdiv(tiles, strip_tiles) if tiles else 0), strip_tiles
