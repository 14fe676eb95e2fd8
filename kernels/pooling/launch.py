"""Plans of pooling and of its gradients, and the launches that they are made of."""

import torch
from torch import Tensor

from ..arrays import Array, Buffer
from ..lib.integers import cdiv, next_power_of_2
from ..lib.maps import row_stride
from ..plan import Plan
from .arguments import Cells, Holders, InvertConfig, PoolingConfig, Taps
from .cells import invert_cells_kernel, pool_backward_kernel, pool_kernel, pool_weight_gradient_kernel
from .problem import MAX, RegionPooling

# Two 16-byte loads in flight a thread. Predicted, not measured; with twice as much float32 spills.
TILE_BYTES = 4096
MAX_BLOCK_CHANNELS = 64
NUM_WARPS = 4
# Programs that share a sum over the tokens of an image; more would only make their partial sums larger.
MAX_STRIPS = 1024


Inputs = tuple[Tensor | None, ...]


def pooling_inputs(
    x: Tensor,
    fill: Tensor | None,
    pooling: RegionPooling[Tensor],
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> Inputs:
    """What a pooling and its gradient take, as the plans take it; see `FusedKernels.pool`.

    Cells that both axes have in common are there once.
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
    """The forward, of `pooling_inputs`: the pooled map, and for `MAX` which token each element is."""
    plan = Plan(inputs, pooling.row_cells.device)
    x, fill, cells, weight, bias = _buffers(plan, pooling)
    grid = pooling.pooled_grid
    pooled = plan.output((x.shape[0], grid.height, grid.width, x.shape[-1]), x.dtype)
    argmax = plan.output(pooled.shape, torch.int32) if pooling.mode == MAX else None
    taps = None if weight is None or bias is None else Taps(weight, bias)
    launch_pool(plan, x, fill, cells, taps, pooled, argmax)
    return plan


def plan_pool_backward(inputs: Inputs, pooling: RegionPooling[Tensor]) -> Plan:
    """The backward, of `pooling_inputs`, the gradient, the forward's maxima, and where the map's goes.

    Its outputs are shares of the gradients of what padding holds and of the weight, those that there are.
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
    """Adds the reduction of every region's tokens to cells.

    Args:
        plan: where to add it.
        x: `(N, H, W, C)` under `pooling.grid`; float32, float16 or bfloat16. A channel slice of a contiguous
            map.
        fill: `(C,)`, what tokens past the map's edge hold; None where the grid is not padded.
        pooling: the cells and how they are reduced.
        taps: the convolution, for `WEIGHTED`.
        pooled: where the pooled map goes, `(N, rows*h', columns*w', C)` of the dtype of `x`.
        argmax: for `MAX`, where the token of its region goes that each element is, int32 of that shape.
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
) -> Buffer | None:
    """Adds the gradient of the map, every element of which is written once.

    Args:
        plan: where to add it.
        grad_pooled: `(N, rows*h', columns*w', C)`, contiguous.
        argmax: the forward's.
        pooling: the forward's.
        weight: of the forward's `taps`.
        grad_x: where the gradient goes, `(N, H, W, C)` with the strides of `x`.

    Returns:
        Shares of the gradient of `fill`, `(programs, C)` float32, an output of the plan; None where the grid
        is not padded.
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
    return partials


def launch_pool_weight_gradient(
    plan: Plan,
    grad_pooled: Buffer,
    x: Buffer,
    fill: Buffer | None,
    pooling: RegionPooling[Buffer],
    weight: Buffer,
) -> Buffer:
    """Adds shares of the weight's gradient, and returns them: `(strips, taps, C)` float32, an output."""
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
    return partials


def _cells(pooling: RegionPooling[Buffer]) -> Cells:
    return Cells(pooling.row_cells, pooling.column_cells)


def _launch_holders(plan: Plan, pooling: RegionPooling[Buffer]) -> Holders:
    """The cells that hold each token; one table for both axes where they have the same cells."""
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
    """Run-time numbers that the kernels have in common."""
    grid = pooling.grid
    return (
        *(grid.height, grid.width, grid.region_height, grid.region_width, grid.rows, grid.columns),
        *(pooling.cells_high, pooling.cells_wide),
    )


def _channel_blocks(config: PoolingConfig) -> int:
    return cdiv(config.CHANNELS, config.BLOCK_C)


def _strips(tiles: int) -> tuple[int, int]:
    """Number of strips that tiles are dealt out to, and tiles in each."""
    strip_tiles = cdiv(tiles, MAX_STRIPS)
    return (cdiv(tiles, strip_tiles) if tiles else 0), strip_tiles
