"""LePE, the locally enhanced positional encoding: a depthwise convolution of the values (paper, eq. 6).

Values are read in place, as a slice of the packed projection. Tokens between the map and the end of its
regions are padding: they all hold `fill` and are not stored. Past the regions everything is 0.

The backward makes no difference between the two kinds of token: what a token receives goes to its place in
the map or, in sum, to `fill`. Padding farther than KERNEL // 2 from the map receives nothing, so that tokens
are enumerated only up to `reach`.

| array | shape | meaning |
|---|---|---|
| value | (N, H, W, DIM), tokens VALUE_STRIDE elements apart | values, a slice of a packed map |
| fill | (DIM,) | what padding holds |
| weight | (DIM, KERNEL * KERNEL) | of the convolution, PyTorch's `(DIM, 1, KERNEL, KERNEL)` |
| bias | (DIM,) | of the convolution |
| attention, out, grad_out | (N, H, W, DIM) | attention output; the same with LePE added; its gradient |
| grad_value | (N, H, W, DIM), tokens GRAD_STRIDE elements apart | gradient of the values, added to in place |
| partials | (programs, ROWS, DIM) fp32 | each program's share of the gradients of weight, bias and fill |

`partials` has KERNEL * KERNEL rows for the weight and one for the bias if NEEDS_WEIGHT_GRAD, then one for the
fill if HAS_FILL.
"""

import triton
import triton.language as tl


@triton.jit
def convolve_tile(
    value,
    fill,
    weight,
    bias,
    row,
    column,
    height,
    width,
    padded_height,
    padded_width,
    channel,
    live,
    channel_live,
    VALUE_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_FILL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Convolution at some tokens of one image: fp32 (tokens, channels), bias included.

    Args:
        value: the image's first value, at channel 0.
        fill: see above; any pointer without HAS_FILL.
        weight: see above.
        bias: see above; any pointer without HAS_BIAS.
        row: (tokens,) int32.
        column: (tokens,) int32.
        height: rows of the map.
        width: columns of the map.
        padded_height: rows of the map and its padding.
        padded_width: columns of the map and its padding.
        channel: (channels,) int32, counted from the first value channel.
        live: (tokens,), False for tokens whose result is not needed; their values are not read.
        channel_live: (channels,), False past DIM.
        VALUE_STRIDE: elements between tokens of `value`.
        KERNEL: side of the convolution, odd.
        HAS_FILL: the map is padded.
        HAS_BIAS: the convolution has a bias.
    """
    HALF: tl.constexpr = KERNEL // 2
    acc = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    # Dead tokens go where no tap reaches the map: the loop needs no mask for them.
    row = tl.where(live, row, -KERNEL)
    token = (row * width + column).to(tl.int64)
    centre = value + token[:, None] * VALUE_STRIDE + channel[None, :]
    fill_tile = fill + tl.zeros_like(row)[:, None] + channel[None, :]
    # The taps stay a loop: unrolled, the compiler starts all their loads at once and spills registers.
    for tap in tl.range(KERNEL * KERNEL):
        row_step, column_step = tap // KERNEL - HALF, tap % KERNEL - HALF
        tap_row, tap_column = row + row_step, column + column_step
        inside = (tap_row >= 0) & (tap_column >= 0)
        in_map = (tap_row < height) & (tap_column < width)
        taps = centre + (row_step * width + column_step) * VALUE_STRIDE
        x = tl.load(taps, mask=(inside & in_map)[:, None] & channel_live[None, :], other=0.0)
        if HAS_FILL:
            # A choice of pointers would spare this second load, but Triton 3.6 cannot compile one for AMD.
            padding = inside & ~in_map & (tap_row < padded_height) & (tap_column < padded_width)
            x = tl.load(fill_tile, mask=padding[:, None] & channel_live[None, :], other=x)
        acc += x.to(tl.float32) * _load_tap_weight(weight, channel, channel_live, tap, KERNEL)
    return acc


@triton.jit
def _load_tap_weight(weight, channel, channel_live, tap, KERNEL: tl.constexpr):
    """Weight of one tap for some channels: fp32 (1, channels)."""
    tap_weight = tl.load(weight + channel * (KERNEL * KERNEL) + tap, mask=channel_live, other=0.0)
    return tap_weight.to(tl.float32)[None, :]


@triton.jit
def _locate_tile(height, width, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """What this program of a grid (N * tiles, channel blocks) works on.

    Returns the image, rows and columns of BLOCK_M tokens (rows past `height` at the end), BLOCK_V channels
    and which of them exist.
    """
    tiles = tl.cdiv(height * width, BLOCK_M)
    image = tl.program_id(0) // tiles
    index = (tl.program_id(0) - image * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = index // width
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    # 64 bits, since the image's offset in the batch may pass 2**31 elements.
    return image.to(tl.int64), row, index - row * width, channel, channel < DIM


@triton.jit(do_not_specialize=["height", "width", "padded_height", "padded_width"])
def lepe_forward(
    attention,
    value,
    fill,
    weight,
    bias,
    out,
    height,
    width,
    padded_height,
    padded_width,
    DIM: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_FILL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Attention output plus LePE of BLOCK_M tokens and BLOCK_V channels; grid (N * tiles, channel blocks)."""
    image, row, column, channel, channel_live = _locate_tile(height, width, DIM, BLOCK_M, BLOCK_V)
    live = row < height
    map_start = image * height * width
    lepe = convolve_tile(
        value + map_start * VALUE_STRIDE,
        fill,
        weight,
        bias,
        row,
        column,
        height,
        width,
        padded_height,
        padded_width,
        channel,
        live,
        channel_live,
        VALUE_STRIDE,
        KERNEL,
        HAS_FILL,
        HAS_BIAS,
    )
    token = map_start + row * width + column
    place = token[:, None] * DIM + channel[None, :]
    mask = live[:, None] & channel_live[None, :]
    total = tl.load(attention + place, mask=mask, other=0.0).to(tl.float32) + lepe
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "reach_height", "reach_width"])
def lepe_backward(
    grad_out,
    value,
    fill,
    weight,
    grad_value,
    partials,
    height,
    width,
    reach_height,
    reach_width,
    DIM: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_FILL: tl.constexpr,
    NEEDS_WEIGHT_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients at BLOCK_M tokens within reach and BLOCK_V channels; grid (N * tiles, channel blocks).

    With dO the gradient of the output and x the values: dx[t] = sum over taps of w[tap] * dO[t - tap], and
    dw[tap] = sum over t of x[t] * dO[t - tap], so that both take the same reads of dO.
    """
    HALF: tl.constexpr = KERNEL // 2
    image, row, column, channel, channel_live = _locate_tile(reach_height, reach_width, DIM, BLOCK_M, BLOCK_V)
    live = row < reach_height
    in_map = (row < height) & (column < width)
    map_mask = in_map[:, None] & channel_live[None, :]
    token = image * height * width + row * width + column
    partial = partials + tl.program_id(0).to(tl.int64) * (ROWS * DIM) + channel

    if NEEDS_WEIGHT_GRAD:
        x = tl.load(value + token[:, None] * VALUE_STRIDE + channel[None, :], mask=map_mask, other=0.0)
        if HAS_FILL:
            padding = tl.load(fill + channel, mask=channel_live, other=0.0)
            x = tl.where((live & ~in_map)[:, None], padding[None, :], x)
        x = x.to(tl.float32)

    grad = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row = tl.where(live, row, -KERNEL)  # as in the forward
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
        grad += do * _load_tap_weight(weight, channel, channel_live, tap, KERNEL)
        if NEEDS_WEIGHT_GRAD:
            tl.store(partial + tap * DIM, tl.sum(x * do, axis=0), mask=channel_live)
    if NEEDS_WEIGHT_GRAD:
        do = tl.load(centre, mask=map_mask, other=0.0).to(tl.float32)
        tl.store(partial + KERNEL * KERNEL * DIM, tl.sum(do, axis=0), mask=channel_live)
    if HAS_FILL:
        grad_fill = tl.sum(tl.where(in_map[:, None], 0.0, grad), axis=0)
        tl.store(partial + (ROWS - 1) * DIM, grad_fill, mask=channel_live)
    places = grad_value + token[:, None] * GRAD_STRIDE + channel[None, :]
    grad += tl.load(places, mask=map_mask, other=0.0).to(tl.float32)
    tl.store(places, grad.to(grad_value.dtype.element_ty), mask=map_mask)
