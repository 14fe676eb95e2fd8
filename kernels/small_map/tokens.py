"""Where the tokens of a program's regions lie, and their rows, a head beside the other.

A grid is a tuple of region height and width, columns, height and width of the map, then the inverses of the
region's tokens, of its width and of the columns. An inverse makes a division a product: the compiler divides
anew in every layout of an address, which was a large part of the forward's loop (`bra-bench report`).
"""

import triton
import triton.language as tl

from ..lib.integers import INVERSE_BITS

_INVERSE_BITS = tl.constexpr(INVERSE_BITS)


@triton.jit
def _divided(x, inverse):
    """x // divisor, see `lib.integers.inverse`."""
    return (x * inverse) >> _INVERSE_BITS


@triton.jit
def _token_of(region, index, grid):
    """Row-major position in the map of token `index` of `region`, -1 for padding."""
    region_height, region_width, columns, height, width, _, of_width, of_columns = grid
    in_row = _divided(index, of_width)
    region_row = _divided(region, of_columns)
    row = region_row * region_height + in_row
    column = (region - region_row * columns) * region_width + index - in_row * region_width
    return tl.where((row < height) & (column < width), row * width + column, -1)


@triton.jit
def has_tokens(region, grid):
    """Whether a region has a token in the map."""
    return _token_of(region, 0, grid) >= 0


@triton.jit
def keys_of(region, topk, grid, kv_grid, CONFIG: tl.constexpr):
    """How many keys the queries of a region attend to: none if all of them are padding."""
    n_keys = topk * kv_grid[0] * kv_grid[1]
    if CONFIG.QUERY_IS_PADDED:
        n_keys = tl.where(has_tokens(region, grid), n_keys, 0)
    return n_keys


@triton.jit
def locate(program, n_regions, CONFIG: tl.constexpr):
    """What one of N * n_regions * groups of heads programs works on: (image, region, first head)."""
    GROUPS: tl.constexpr = CONFIG.NUM_HEADS // CONFIG.HEADS
    group = program % GROUPS
    region = program // GROUPS % n_regions
    # 64 bits, because the image's offset in the batch may exceed 2**31 elements.
    image = (program // (GROUPS * n_regions)).to(tl.int64)
    return image, region, group * CONFIG.HEADS


@triton.jit
def chosen(choices, image, region, topk, n_regions, CONFIG: tl.constexpr):
    """Regions that a region has chosen and their factors, zeros where there are none: (BLOCK_K,) each."""
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    slot = tl.arange(0, BLOCK_K)
    slots = (image * n_regions + region) * topk + slot
    regions = tl.load(choices.r_idx + slots, mask=slot < topk, other=0)
    weight = tl.zeros([BLOCK_K], tl.float32)  # a function cannot return None among tensors
    if CONFIG.IS_SOFT:
        weight = tl.load(choices.r_weight + slots, mask=slot < topk, other=0.0)
    return regions, weight


@triton.jit
def own_tokens(region, grid, BLOCK: tl.constexpr):
    """Tokens of a region and whether they exist: (BLOCK,) each; the token is -1 for padding."""
    index = tl.arange(0, BLOCK)
    exists = index < grid[0] * grid[1]
    return tl.where(exists, _token_of(region, index, grid), -1), exists


@triton.jit
def listed_tokens(regions, n_listed, start, grid, BLOCK: tl.constexpr):
    """BLOCK tokens, from the `start`-th, of the first `n_listed` of `regions`, region after region.

    Args:
        regions: (slots,) int32, a power of two of them.
        n_listed: how many of them count.
        start: first token.
        grid: of the regions.
        BLOCK: tokens to return.

    Returns:
        Token number (-1 for padding), whether there is such a token, and the slot of its region: (BLOCK,).
    """
    region_tokens = grid[0] * grid[1]
    position = start + tl.arange(0, BLOCK)
    slot = _divided(position, grid[5])
    live = slot < n_listed
    slot = tl.minimum(slot, regions.shape[0] - 1)
    token = _token_of(tl.gather(regions, slot, 0), position - slot * region_tokens, grid)
    return tl.where(live, token, -1), live, slot


@triton.jit
def load_heads(
    base, padding, token, live, head, ROW_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of tokens, (heads, tokens, BLOCK channels); 0 past HEAD_DIM and if not live.

    `padding` points to the row that stands for token -1; None if no live token is -1.
    """
    in_head = tl.arange(0, BLOCK)
    channel = head[:, None, None] * HEAD_DIM + in_head[None, None, :]
    rows = base + token[None, :, None] * ROW_STRIDE + channel
    if padding is not None:
        rows = tl.where((token >= 0)[None, :, None], rows, padding + channel)
    return tl.load(rows, mask=live[None, :, None] & (in_head < HEAD_DIM)[None, None, :], other=0.0)


@triton.jit
def load_queries(maps, image, map_tokens, token, live, head, CONFIG: tl.constexpr):
    """Queries of an image, (heads, tokens, BLOCK_QK)."""
    base = maps.query + image * map_tokens * CONFIG.QUERY_STRIDE
    return load_heads(base, None, token, live, head, CONFIG.QUERY_STRIDE, CONFIG.QK_HEAD_DIM, CONFIG.BLOCK_QK)


@triton.jit
def load_keys_values(maps, padding, image, kv_tokens, token, live, head, CONFIG: tl.constexpr):
    """Keys (heads, tokens, BLOCK_QK) and values (heads, tokens, BLOCK_V) of an image."""
    key_padding = None if padding is None else padding.key
    value_padding = None if padding is None else padding.value
    key = load_heads(
        maps.key + image * kv_tokens * CONFIG.KEY_STRIDE,
        key_padding,
        token,
        live,
        head,
        CONFIG.KEY_STRIDE,
        CONFIG.QK_HEAD_DIM,
        CONFIG.BLOCK_QK,
    )
    value = load_heads(
        maps.value + image * kv_tokens * CONFIG.VALUE_STRIDE,
        value_padding,
        token,
        live,
        head,
        CONFIG.VALUE_STRIDE,
        CONFIG.V_HEAD_DIM,
        CONFIG.BLOCK_V,
    )
    return key, value


@triton.jit
def store_heads(base, token, live, head, rows, ROW_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Stores rows (heads, tokens, channels) of the live tokens in `base`'s dtype, channels up to HEAD_DIM."""
    in_head = tl.arange(0, rows.shape[2])
    channel = head[:, None, None] * HEAD_DIM + in_head[None, None, :]
    tl.store(
        base + token[None, :, None] * ROW_STRIDE + channel,
        rows.to(base.dtype.element_ty),
        mask=live[None, :, None] & (in_head < HEAD_DIM)[None, None, :],
    )


@triton.jit
def transposed(x):
    """The last two axes of (heads, rows, columns) exchanged."""
    return tl.permute(x, (0, 2, 1))
