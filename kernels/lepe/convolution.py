"""LePE, the locally enhanced positional encoding: a depthwise convolution of the values (paper, eq. 6).

Values are read in place, as a slice of the packed projection. Tokens between the map's edge and the end of
its regions are padding: all of them hold `fill`, and their results are not stored. Past the regions
everything is 0.

The backward computes the gradients of the map's tokens and of padding tokens alike. It stores those of the
map's tokens in the map and adds those of padding tokens to the gradient of `fill`. Padding more than
KERNEL // 2 from the map receives no gradient, so the backward only takes the tokens within `Lepe.reach`.

| array | shape | meaning |
|---|---|---|
| lepe | | values, weight, fill and bias, see `LepeParts` |
| attention, out, grad_out | (N, H, W, DIM) | attention's output; the same plus LePE; gradient of that sum |
| grad_value | (N, H, W, DIM), tokens GRAD_STRIDE apart | gradient of the values; with ADDS_TO_GRAD added to |
| shares | (programs, ROWS, DIM) fp32 | each program's share of the gradients of weight, bias and fill |

`shares` has KERNEL * KERNEL rows for the weight and one for the bias if NEEDS_WEIGHT_GRAD, then one for the
fill if there is one.
"""

import triton
import triton.language as tl


@triton.jit
def convolve_tile(
    lepe,
    first_value,
    row,
    column,
    sizes,
    channel,
    live,
    channel_live,
    VALUE_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """Convolution at some tokens of one image: fp32 (tokens, channels), bias included.

    Args:
        lepe: a `LepeParts`.
        first_value: elements from the start of `lepe.value` to the image's first one.
        row: (tokens,) int32.
        column: (tokens,) int32.
        sizes: height and width of the map, then those of the map with its padding.
        channel: (channels,) int32, counted from the first value channel.
        live: (tokens,), False for tokens whose result is not needed; their values are not read.
        channel_live: (channels,), False past DIM.
        VALUE_STRIDE: elements between tokens of the values.
        KERNEL: side of the convolution, odd.
    """
    height, width, padded_height, padded_width = sizes
    HALF: tl.constexpr = KERNEL // 2
    acc = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    if lepe.bias is not None:
        acc += tl.load(lepe.bias + channel, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    # Dead tokens get a row from which no tap reaches the map, so the loop needs no mask for them.
    row = tl.where(live, row, -KERNEL)
    token = (row * width + column).to(tl.int64)
    centre = lepe.value + first_value + token[:, None] * VALUE_STRIDE + channel[None, :]
    if lepe.fill is not None:
        fill = lepe.fill + tl.zeros_like(row)[:, None] + channel[None, :]
    # Do not unroll this loop: the compiler would start the loads of all taps at once and spill registers.
    for tap in tl.range(KERNEL * KERNEL):
        row_step, column_step = tap // KERNEL - HALF, tap % KERNEL - HALF
        tap_row, tap_column = row + row_step, column + column_step
        inside = (tap_row >= 0) & (tap_column >= 0)
        in_map = (tap_row < height) & (tap_column < width)
        taps = centre + (row_step * width + column_step) * VALUE_STRIDE
        x = tl.load(taps, mask=(inside & in_map)[:, None] & channel_live[None, :], other=0.0)
        if lepe.fill is not None:
            # `tl.where` between the two pointers would save this second load, but Triton 3.6 cannot compile
            # that for AMD.
            padding = inside & ~in_map & (tap_row < padded_height) & (tap_column < padded_width)
            x = tl.load(fill, mask=padding[:, None] & channel_live[None, :], other=x)
        acc += x.to(tl.float32) * _load_tap_weight(lepe.weight, channel, channel_live, tap, KERNEL)
    return acc


@triton.jit
def _load_tap_weight(weight, channel, channel_live, tap, KERNEL: tl.constexpr):
    """Weight of one tap for some channels: fp32 (1, channels)."""
    tap_weight = tl.load(weight + channel * (KERNEL * KERNEL) + tap, mask=channel_live, other=0.0)
    return tap_weight.to(tl.float32)[None, :]


@triton.jit
def _locate_tile(height, width, CONFIG: tl.constexpr):
    """The tokens and channels that this program of a grid (N * tiles, channel blocks) works on.

    Returns the image, the rows and the columns of BLOCK_M tokens (tokens past the end of the map have rows
    from `height` on), BLOCK_V channels, and which of the channels exist.
    """
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_V: tl.constexpr = CONFIG.BLOCK_V
    tiles = tl.cdiv(height * width, BLOCK_M)
    image = tl.program_id(0) // tiles
    index = (tl.program_id(0) - image * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = index // width
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    # 64 bits, because the image's offset in the batch may exceed 2**31 elements.
    return image.to(tl.int64), row, index - row * width, channel, channel < CONFIG.DIM


@triton.jit(do_not_specialize=["height", "width", "padded_height", "padded_width"])
def lepe_forward_kernel(
    attention,
    lepe,
    out,
    height,
    width,
    padded_height,
    padded_width,
    CONFIG: tl.constexpr,
):
    """Attention output plus LePE of BLOCK_M tokens and BLOCK_V channels; grid (N * tiles, channel blocks)."""
    DIM: tl.constexpr = CONFIG.DIM
    image, row, column, channel, channel_live = _locate_tile(height, width, CONFIG)
    live = row < height
    map_start = image * height * width
    convolved = convolve_tile(
        lepe,
        map_start * CONFIG.VALUE_STRIDE,
        row,
        column,
        (height, width, padded_height, padded_width),
        channel,
        live,
        channel_live,
        CONFIG.VALUE_STRIDE,
        CONFIG.KERNEL,
    )
    token = map_start + row * width + column
    place = token[:, None] * DIM + channel[None, :]
    mask = live[:, None] & channel_live[None, :]
    total = tl.load(attention + place, mask=mask, other=0.0).to(tl.float32) + convolved
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "reach_height", "reach_width"])
def lepe_backward_kernel(
    grad_out,
    lepe,
    grad_value,
    shares,
    height,
    width,
    reach_height,
    reach_width,
    CONFIG: tl.constexpr,
):
    """Gradients at BLOCK_M tokens within reach and BLOCK_V channels; grid (N * tiles, channel blocks).

    With dO the gradient of the output and x the values: dx[t] = sum over taps of w[tap] * dO[t - tap], and
    dw[tap] = sum over t of x[t] * dO[t - tap]. The same load of dO serves both.
    """
    DIM: tl.constexpr = CONFIG.DIM
    KERNEL: tl.constexpr = CONFIG.KERNEL
    ROWS: tl.constexpr = CONFIG.ROWS
    BLOCK_M: tl.constexpr = CONFIG.BLOCK_M
    BLOCK_V: tl.constexpr = CONFIG.BLOCK_V
    HALF: tl.constexpr = KERNEL // 2
    image, row, column, channel, channel_live = _locate_tile(reach_height, reach_width, CONFIG)
    live = row < reach_height
    in_map = (row < height) & (column < width)
    map_mask = in_map[:, None] & channel_live[None, :]
    token = image * height * width + row * width + column
    own_share = shares + tl.program_id(0).to(tl.int64) * (ROWS * DIM) + channel

    if CONFIG.NEEDS_WEIGHT_GRAD:
        values = lepe.value + token[:, None] * CONFIG.VALUE_STRIDE + channel[None, :]
        x = tl.load(values, mask=map_mask, other=0.0)
        if lepe.fill is not None:
            padding = tl.load(lepe.fill + channel, mask=channel_live, other=0.0)
            x = tl.where((live & ~in_map)[:, None], padding[None, :], x)
        x = x.to(tl.float32)

    grad = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row = tl.where(live, row, -KERNEL)  # as in `convolve_tile`
    centre = grad_out + token[:, None] * DIM + channel[None, :]
    for tap in tl.range(KERNEL * KERNEL):
        row_step, column_step = tap // KERNEL - HALF, tap % KERNEL - HALF
        out_row, out_column = row - row_step, column - column_step
        exists = (out_row >= 0) & (out_row < height) & (out_column >= 0) & (out_column < width)
        do = tl.load(
            centre - (row_step * width + column_step) * DIM,
            mask=exists[:, None] & channel_live[None, :],
            other=0.0,
        ).to(tl.float32)
        grad += do * _load_tap_weight(lepe.weight, channel, channel_live, tap, KERNEL)
        if CONFIG.NEEDS_WEIGHT_GRAD:
            tl.store(own_share + tap * DIM, tl.sum(x * do, axis=0), mask=channel_live)
    if CONFIG.NEEDS_WEIGHT_GRAD:
        do = tl.load(centre, mask=map_mask, other=0.0).to(tl.float32)
        tl.store(own_share + KERNEL * KERNEL * DIM, tl.sum(do, axis=0), mask=channel_live)
    if lepe.fill is not None:
        grad_fill = tl.sum(tl.where(in_map[:, None], 0.0, grad), axis=0)
        tl.store(own_share + (ROWS - 1) * DIM, grad_fill, mask=channel_live)
    places = grad_value + token[:, None] * CONFIG.GRAD_STRIDE + channel[None, :]
    if CONFIG.ADDS_TO_GRAD:
        grad += tl.load(places, mask=map_mask, other=0.0).to(tl.float32)
    tl.store(places, grad.to(grad_value.dtype.element_ty), mask=map_mask)


@triton.jit
def sum_lepe_shares(program, shares, sums, n_shares, SUMS: tl.constexpr):
    """Sums one row of `shares` over all programs that wrote it, in a fixed order, for a block of channels.

    Args:
        program: number of this program, of ROWS * channel blocks.
        shares: from `lepe_backward_kernel`.
        sums: where the sums go, a `LepeSums`.
        n_shares: number of programs that wrote a share.
        SUMS: a `LepeSumsConfig`.
    """
    BLOCK_P: tl.constexpr = SUMS.BLOCK_P
    BLOCK_C: tl.constexpr = SUMS.BLOCK_C
    blocks = tl.cdiv(SUMS.DIM, BLOCK_C)
    row = program // blocks
    channel = (program - row * blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = channel < SUMS.DIM
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, n_shares, BLOCK_P):
        share = first + tl.arange(0, BLOCK_P)
        at = (share.to(tl.int64) * SUMS.ROWS + row)[:, None] * SUMS.DIM + channel[None, :]
        total += tl.load(shares + at, mask=(share < n_shares)[:, None] & live[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    if SUMS.HAS_TAPS:
        if sums.weight is not None:
            places = sums.weight + channel * SUMS.TAPS + row
            tl.store(places, total.to(sums.weight.dtype.element_ty), mask=live & (row < SUMS.TAPS))
        if sums.bias is not None:
            places = sums.bias + channel
            tl.store(places, total.to(sums.bias.dtype.element_ty), mask=live & (row == SUMS.TAPS))
    if sums.fill is not None:
        tl.store(sums.fill + channel, total, mask=live & (row == SUMS.ROWS - 1))
