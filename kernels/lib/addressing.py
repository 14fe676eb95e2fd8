"""Where tokens lie: shared address arithmetic of the kernels.

The attention kernels know no geometry. They walk lists of token numbers (row-major positions in the map, -1
for padding), as paged attention walks page tables, and `token_of` alone knows how regions are cut. A list
costs 4 bytes a listed key, shared by all heads; computing the same numbers inside the loop costs 7 to 12 % of
the loop (issue slots per score, forward, float16, 128 x 128, 8 warps, compiled for sm_90: 6.45 with a list,
7.23 computed at head 32; 7.00 and 8.39 at head 64; dense attention 6.39 and 6.83).
"""

import triton
import triton.language as tl


@triton.jit
def locate_program(program, n_regions, tiles, NUM_HEADS: tl.constexpr):
    """What one of N * n_regions * tiles * heads programs works on: (image, region, tile, head).

    Heads run fastest: programs that run together read neighbouring channels of the same rows.
    """
    head = program % NUM_HEADS
    pid = program // NUM_HEADS
    tile = pid % tiles
    pid = pid // tiles
    # 64 bits, since the image's offset in the batch may pass 2**31 elements.
    return (pid // n_regions).to(tl.int64), pid % n_regions, tile, head


@triton.jit
def graph_of(image, head, N_GRAPHS: tl.constexpr):
    """Number of the graph that a head follows: of one for all images (0), one per image, or one per head."""
    if N_GRAPHS == 0:
        graph = image * 0
    elif N_GRAPHS == 1:
        graph = image
    else:
        graph = image * N_GRAPHS + head
    return graph


@triton.jit
def token_of(region, index, region_height, region_width, columns, height, width):
    """Row-major position in the map of token `index` of `region`, -1 for padding."""
    in_row = index // region_width
    region_row = region // columns
    row = region_row * region_height + in_row
    column = (region - region_row * columns) * region_width + index - in_row * region_width
    return tl.where((row < height) & (column < width), row * width + column, -1)


@triton.jit
def own_tokens(region_list, region, tile, region_tokens, BLOCK: tl.constexpr, AGAIN: tl.constexpr = False):
    """BLOCK tokens of a region, from the list of all regions' tokens: index in the region, exists, token.

    AGAIN after a loop reads them anew, which is cheaper than to hold them in registers through the loop.
    """
    index = tile * BLOCK + tl.arange(0, BLOCK)
    exists = index < region_tokens
    token = tl.load(region_list + region * region_tokens + index, mask=exists, other=-1, volatile=AGAIN)
    return index, exists, token


@triton.jit
def load_rows(base, padding, token, channel, live, ROW_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Channels of one head of the tokens `token`: (tokens, channels), zero past HEAD_DIM and where not live.

    `padding` is the row that tokens of number -1 hold, or None where there are none; `live` may be None. The
    stride must be a compile-time number: with a run-time one the compiler cannot tell that rows start at
    multiples of 16 bytes, and loads 2 bytes at a time. For the same reason whole addresses are selected, not
    starts of rows (forward, head 64, sm_90: 7.3 issue slots a score against 8.6).
    """
    rows = base + token.to(tl.int64)[:, None] * ROW_STRIDE + channel[None, :]
    if padding is not None:
        rows = tl.where((token >= 0)[:, None], rows, padding + channel[None, :])
    if live is not None:
        return tl.load(rows, mask=live[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    elif channel.shape[0] != HEAD_DIM:
        return tl.load(rows, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(rows)


@triton.jit
def store_rows(base, token, channel, live, rows, ROW_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Stores channels of one head of the tokens `token` that are live, in the type of `base`."""
    tl.store(
        base + token.to(tl.int64)[:, None] * ROW_STRIDE + channel[None, :],
        rows.to(base.dtype.element_ty),
        mask=live[:, None] & (channel < HEAD_DIM)[None, :],
    )
