"""Pooling of the tokens of every region to cells, and its gradients, without copies and without atomics.

The kernels read the cells of a region from two tables. Therefore one kernel serves adaptive, plain and
fractional pooling and strided convolution, and the host never needs the random samples of fractional pooling,
which are drawn on the device.

| array | shape | meaning |
|---|---|---|
| x, grad_x | (N, HEIGHT, WIDTH, TOKEN_STRIDE), of which CHANNELS | a slice of a packed NHWC map |
| fill | (CHANNELS,) | what tokens past the map's edge hold; None if the map is not padded |
| taps | | weight and bias of a convolution, see `Taps`; None in the other modes |
| cells | | start and end of every cell, see `Cells` |
| holders | | the cells that contain each token, see `Holders` |
| pooled, grad_pooled | (N, rows * cells_high, columns * cells_wide, CHANNELS) | pooled map, NHWC |
| argmax | as pooled, int32 | index, in its region, of the token with the maximum; None in the other modes |
| fill_partials | (N * strips, CHANNELS) fp32 | each program's share of the gradient of fill, or None |
| weight_partials | (strips, taps, CHANNELS) fp32 | each program's share of the gradient of weight |

A tile is BLOCK_T tokens of a map, in row-major order, times BLOCK_C channels. A program of the backward owns
tokens of the padded map and adds up what the cells that contain them contribute. It processes several tiles,
a strip, one after the other. So there are few programs, and their shares of sums over all tokens take little
memory compared with the map.
"""

import triton
import triton.language as tl

_SIZES = [
    *("height", "width", "region_height", "region_width", "rows", "columns", "cells_high", "cells_wide"),
    *("strip_tiles", "tiles", "strips"),
]


@triton.jit
def _span(spans, index, live):
    """Start and end at `index` of a table of cells or holders; (0, 1) where not live."""
    start = tl.load(spans + 2 * index, mask=live, other=0)
    return start, tl.load(spans + 2 * index + 1, mask=live, other=1)


@triton.jit
def _load_tokens(
    image,
    fill,
    row,
    column,
    channel,
    live,
    height,
    width,
    CONFIG: tl.constexpr,
):
    """Loads tokens of an image, (tokens, channels) in float32; tokens past the map's edge hold `fill`."""
    CHANNELS: tl.constexpr = CONFIG.CHANNELS
    if fill is not None:
        live = live & (row < height) & (column < width)
    token = (row * width + column).to(tl.int64)
    rows = image + token[:, None] * CONFIG.TOKEN_STRIDE + channel[None, :]
    value = tl.load(rows, mask=live[:, None] & (channel < CHANNELS)[None, :], other=0.0).to(tl.float32)
    if fill is not None:
        padding = tl.load(fill + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        value = tl.where(live[:, None], value, padding[None, :])
    return value


@triton.jit(do_not_specialize=_SIZES)
def pool_kernel(
    x,
    fill,
    taps,
    cells,
    pooled,
    argmax,
    height,
    width,
    region_height,
    region_width,
    rows,
    columns,
    cells_high,
    cells_wide,
    CONFIG: tl.constexpr,
):
    """Computes a tile of the pooled map; grid (N * tiles, channel blocks)."""
    MODE: tl.constexpr = CONFIG.MODE
    CHANNELS: tl.constexpr = CONFIG.CHANNELS
    BLOCK_T: tl.constexpr = CONFIG.BLOCK_T
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    pooled_width = columns * cells_wide
    pooled_tokens = rows * cells_high * pooled_width
    tiles = tl.cdiv(pooled_tokens, BLOCK_T)
    # 64 bits, because the image's offset in the batch may exceed 2**31 elements.
    image = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += image * height * width * CONFIG.TOKEN_STRIDE

    cell = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    live = cell < pooled_tokens
    pooled_row = cell // pooled_width
    pooled_column = cell % pooled_width
    row_start, row_end = _span(cells.rows, pooled_row % cells_high, live)
    column_start, column_end = _span(cells.columns, pooled_column % cells_wide, live)
    region_top = pooled_row // cells_high * region_height
    region_left = pooled_column // cells_wide * region_width

    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    if MODE == "max":
        total += float("-inf")
        winner = tl.zeros([BLOCK_T, BLOCK_C], tl.int32) + (row_start * region_width + column_start)[:, None]
    for i in tl.range(0, tl.max(row_end - row_start, axis=0)):
        for j in tl.range(0, tl.max(column_end - column_start, axis=0)):
            row = row_start + i
            column = column_start + j
            inside = live & (row < row_end) & (column < column_end)
            value = _load_tokens(
                x,
                fill,
                region_top + row,
                region_left + column,
                channel,
                inside,
                height,
                width,
                CONFIG,
            )
            if MODE == "max":
                better = inside[:, None] & ((value > total) | (value != value))
                total = tl.where(better, value, total)
                winner = tl.where(better, (row * region_width + column)[:, None], winner)
            elif MODE == "mean":
                total += tl.where(inside[:, None], value, 0.0)
            else:
                tap = taps.weight + (i * CONFIG.KERNEL_WIDTH + j) * CHANNELS + channel
                total += value * tl.load(tap, mask=channel < CHANNELS, other=0.0)[None, :]
    if MODE == "mean":
        total = total / ((row_end - row_start) * (column_end - column_start)).to(tl.float32)[:, None]
    if MODE == "weighted":
        total += tl.load(taps.bias + channel, mask=channel < CHANNELS, other=0.0)[None, :]

    element = (image * pooled_tokens + cell)[:, None] * CHANNELS + channel[None, :]
    stored = live[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pooled + element, total.to(pooled.dtype.element_ty), mask=stored)
    if MODE == "max":
        tl.store(argmax + element, winner, mask=stored)


@triton.jit(do_not_specialize=["count", "side"])
def invert_cells_kernel(cells, holders, count, side, CONFIG: tl.constexpr):
    """Finds which cells contain each token of an axis; grid (blocks of tokens,).

    Cells ascend, so the number of cells that end at or before a token is the number of the first cell that
    contains it, and the number of cells that start at or before the token is the end of that range.
    """
    BLOCK: tl.constexpr = CONFIG.BLOCK
    BLOCK_CELLS: tl.constexpr = CONFIG.BLOCK_CELLS
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.int32)
    stop = tl.zeros([BLOCK], tl.int32)
    for first_cell in tl.range(0, count, BLOCK_CELLS):
        cell = first_cell + tl.arange(0, BLOCK_CELLS)
        live = (cell < count)[None, :]
        start, end = _span(cells, cell, cell < count)
        first += tl.sum(tl.where(live & (end[None, :] <= token[:, None]), 1, 0), axis=1)
        stop += tl.sum(tl.where(live & (start[None, :] <= token[:, None]), 1, 0), axis=1)
    tl.store(holders + 2 * token, first, mask=token < side)
    tl.store(holders + 2 * token + 1, stop, mask=token < side)


@triton.jit(do_not_specialize=_SIZES)
def pool_backward_kernel(
    grad_pooled,
    argmax,
    weight,
    cells,
    holders,
    grad_x,
    fill_partials,
    height,
    width,
    region_height,
    region_width,
    rows,
    columns,
    cells_high,
    cells_wide,
    strips,
    strip_tiles,
    CONFIG: tl.constexpr,
):
    """Computes the gradient of a strip of the padded map; grid (N * strips, channel blocks)."""
    MODE: tl.constexpr = CONFIG.MODE
    CHANNELS: tl.constexpr = CONFIG.CHANNELS
    BLOCK_T: tl.constexpr = CONFIG.BLOCK_T
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    pooled_width = columns * cells_wide
    image = (tl.program_id(0) // strips).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_live = (channel < CHANNELS)[None, :]
    grad_x += image * height * width * CONFIG.TOKEN_STRIDE
    first_element = image * (rows * cells_high * pooled_width) * CHANNELS
    grad_pooled += first_element
    if MODE == "max":
        argmax += first_element

    fill_total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    first_tile = tl.program_id(0) % strips * strip_tiles
    for tile in tl.range(first_tile, first_tile + strip_tiles):
        token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        map_row = token // (columns * region_width)
        map_column = token % (columns * region_width)
        live = map_row < rows * region_height
        row = map_row % region_height
        column = map_column % region_width
        first_row, stop_row = _span(holders.rows, row, live)
        first_column, stop_column = _span(holders.columns, column, live)
        pooled_top = map_row // region_height * cells_high
        pooled_left = map_column // region_width * cells_wide

        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for i in tl.range(0, tl.max(stop_row - first_row, axis=0)):
            row_inside = live & (first_row + i < stop_row)
            row_start, row_end = _span(cells.rows, first_row + i, row_inside)
            for j in tl.range(0, tl.max(stop_column - first_column, axis=0)):
                inside = row_inside & (first_column + j < stop_column)
                column_start, column_end = _span(cells.columns, first_column + j, inside)
                cell = (pooled_top + first_row + i) * pooled_width + pooled_left + first_column + j
                cell_start = cell.to(tl.int64) * CHANNELS
                loaded = inside[:, None] & channel_live
                grads = (grad_pooled + cell_start)[:, None] + channel[None, :]
                grad = tl.load(grads, mask=loaded, other=0.0).to(tl.float32)
                if MODE == "max":
                    winners = (argmax + cell_start)[:, None] + channel[None, :]
                    winner = tl.load(winners, mask=loaded, other=-1)
                    total += tl.where(winner == (row * region_width + column)[:, None], grad, 0.0)
                elif MODE == "mean":
                    size = (row_end - row_start) * (column_end - column_start)
                    total += grad / size.to(tl.float32)[:, None]
                else:
                    tap = (row - row_start) * CONFIG.KERNEL_WIDTH + column - column_start
                    tap_weights = weight + tap[:, None] * CHANNELS + channel[None, :]
                    total += grad * tl.load(tap_weights, mask=loaded, other=0.0)

        in_map = live & (map_row < height) & (map_column < width)
        token = (map_row * width + map_column).to(tl.int64)
        tokens = grad_x + token[:, None] * CONFIG.TOKEN_STRIDE + channel[None, :]
        tl.store(tokens, total.to(grad_x.dtype.element_ty), mask=in_map[:, None] & channel_live)
        if fill_partials is not None:
            fill_total += tl.where((live & ~in_map)[:, None], total, 0.0)
    if fill_partials is not None:
        partial = fill_partials + tl.program_id(0).to(tl.int64) * CHANNELS + channel
        tl.store(partial, tl.sum(fill_total, axis=0), mask=channel < CHANNELS)


@triton.jit(do_not_specialize=_SIZES)
def pool_weight_gradient_kernel(
    grad_pooled,
    x,
    fill,
    cells,
    weight_partials,
    height,
    width,
    region_height,
    region_width,
    rows,
    columns,
    cells_high,
    cells_wide,
    tiles,
    strip_tiles,
    CONFIG: tl.constexpr,
):
    """A strip's share of the gradient of one tap; grid (strips, channel blocks, taps).

    The strips together cover the tiles of all N pooled maps.
    """
    KERNEL_WIDTH: tl.constexpr = CONFIG.KERNEL_WIDTH
    CHANNELS: tl.constexpr = CONFIG.CHANNELS
    BLOCK_T: tl.constexpr = CONFIG.BLOCK_T
    BLOCK_C: tl.constexpr = CONFIG.BLOCK_C
    pooled_width = columns * cells_wide
    pooled_tokens = rows * cells_high * pooled_width
    image_tiles = tl.cdiv(pooled_tokens, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(2)

    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    first_tile = tl.program_id(0) * strip_tiles
    for tile in tl.range(first_tile, tl.minimum(first_tile + strip_tiles, tiles)):
        image = (tile // image_tiles).to(tl.int64)
        cell = tile % image_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        live = cell < pooled_tokens
        pooled_row = cell // pooled_width
        pooled_column = cell % pooled_width
        row_start, _ = _span(cells.rows, pooled_row % cells_high, live)
        column_start, _ = _span(cells.columns, pooled_column % cells_wide, live)
        value = _load_tokens(
            x + image * height * width * CONFIG.TOKEN_STRIDE,
            fill,
            pooled_row // cells_high * region_height + row_start + tap // KERNEL_WIDTH,
            pooled_column // cells_wide * region_width + column_start + tap % KERNEL_WIDTH,
            channel,
            live,
            height,
            width,
            CONFIG,
        )
        element = (image * pooled_tokens + cell)[:, None] * CHANNELS + channel[None, :]
        loaded = live[:, None] & (channel < CHANNELS)[None, :]
        total += value * tl.load(grad_pooled + element, mask=loaded, other=0.0).to(tl.float32)
    share = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tap
    partial = weight_partials + share * CHANNELS + channel
    tl.store(partial, tl.sum(total, axis=0), mask=channel < CHANNELS)
