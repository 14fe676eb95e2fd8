"""Where a token of a routed list lies: shared address arithmetic of the attention kernels.

A routed list runs through the tokens of several regions, region after region ("slot" counts them), row after
row inside a region. The kernels walk such a list in tiles and ignore region borders, so that small regions
waste no lanes. A position in it is the mixed-radix number (slot, row, column) with radices
(-, region_height, region_width).

Advancing the three digits costs some integer additions and selections a key and a step. Dividing the position
anew would take reciprocals and conversions, which run on the unit that also computes the exponentials, the
loop's bottleneck; a table of offsets would be one more array to build and load.
"""

import triton
import triton.language as tl


@triton.jit
def locate_program(tiles, NUM_HEADS: tl.constexpr, N_REGIONS: tl.constexpr):
    """What this program of a 1-d grid of N * P * tiles * heads works on: (image, region, tile, head).

    Heads run fastest: programs that run together read neighbouring channels of the same rows.
    """
    pid = tl.program_id(0)
    head = pid % NUM_HEADS
    pid = pid // NUM_HEADS
    tile = pid % tiles
    pid = pid // tiles
    # 64 bits, since the image's offset in the batch may pass 2**31 elements.
    return (pid // N_REGIONS).to(tl.int64), pid % N_REGIONS, tile, head


@triton.jit
def tokens_of_tile(tile, region, region_height, region_width, N_WIN: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK tokens of a region: positions in the region, which of them exist, positions in the map."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    row = index // region_width
    token = token_of(region, row, index - row * region_width, region_height, region_width, N_WIN)
    return index, index < region_height * region_width, token


@triton.jit
def list_position(index, region_height, region_width):
    """Digits (slot, row, column) of list positions `index` (int32, any shape)."""
    region_tokens = region_height * region_width
    slot = index // region_tokens
    index -= slot * region_tokens
    row = index // region_width
    return slot, row, index - row * region_width


@triton.jit
def advance(slot, row, column, slot_step, row_step, column_step, region_height, region_width):
    """Adds a list position to another, digit by digit with carry; the digits of both are in range."""
    column += column_step
    carry = column >= region_width
    column = tl.where(carry, column - region_width, column)
    row += tl.where(carry, row_step + 1, row_step)
    carry = row >= region_height
    row = tl.where(carry, row - region_height, row)
    slot += tl.where(carry, slot_step + 1, slot_step)
    return slot, row, column


@triton.jit
def token_of(region, row, column, region_height, region_width, N_WIN: tl.constexpr):
    """Row-major position in the map of the token at (`row`, `column`) of `region`."""
    region_row = region // N_WIN
    region_column = region - region_row * N_WIN
    map_width = region_width * N_WIN
    return (region_row * region_height + row) * map_width + region_column * region_width + column


@triton.jit
def load_rows(
    base, token, channel, live, ROW_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr
):
    """Channels of one head of the tokens `token`: (tokens, channels), zero past HEAD_DIM and where not live.

    The stride must be a compile-time number: with a run-time one the compiler cannot tell that rows start at
    multiples of 16 bytes, and loads 2 bytes at a time. Without MASKED `live` is not looked at.
    """
    rows = base + token[:, None] * ROW_STRIDE + channel[None, :]
    if MASKED:
        return tl.load(rows, mask=live[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    elif channel.shape[0] != HEAD_DIM:
        return tl.load(rows, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(rows)
