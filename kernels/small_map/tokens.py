"""Token numbers of a program's regions, and functions that load and store their rows for several heads.

A grid is a tuple of region height and width, columns of regions, height and width of the map, then three
inverses: of a region's number of tokens, of its width and of the columns. An inverse turns a division into a
product. Without inverses the compiler repeated each division in every layout of an address, which was a large
part of the forward's loop (`bra-bench report`).
"""

import triton
import triton.language as tl

from ..lib.integers import INVERSE_BITS

_INVERSE_BITS = tl.constexpr(INVERSE_BITS)


@triton.jit
def _divided(x, inverse):
    """x // divisor, where `inverse` is `lib.integers.inverse(divisor)`."""
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
    """Number of keys that the queries of a region attend to: 0 if all these queries are padding."""
    n_keys = topk * kv_grid[0] * kv_grid[1]
    if CONFIG.QUERY_IS_PADDED:
        n_keys = tl.where(has_tokens(region, grid), n_keys, 0)
    return n_keys


@triton.jit
def locate(program, n_regions, CONFIG: tl.constexpr):
    """The (image, region, first head) that one of N * n_regions * GROUPS programs works on."""
    GROUPS: tl.constexpr = CONFIG.NUM_HEADS // CONFIG.HEADS
    group = program % GROUPS
    region = program // GROUPS % n_regions
    # 64 bits, because the image's offset in the batch may exceed 2**31 elements.
    image = (program // (GROUPS * n_regions)).to(tl.int64)
    return image, region, group * CONFIG.HEADS


@triton.jit
def chosen(choices, image, region, topk, n_regions, CONFIG: tl.constexpr):
    """The regions that `region` chose, from `choices`, and their factors: (BLOCK_K,) each, 0 past `topk`."""
    BLOCK_K: tl.constexpr = CONFIG.BLOCK_K
    slot = tl.arange(0, BLOCK_K)
    slots = (image * n_regions + region) * topk + slot
    regions = tl.load(choices.r_idx + slots, mask=slot < topk, other=0)
    weight = tl.zeros([BLOCK_K], tl.float32)  # Triton functions cannot return None together with tensors
    if CONFIG.IS_SOFT:
        weight = tl.load(choices.r_weight + slots, mask=slot < topk, other=0.0)
    return regions, weight


@triton.jit
def own_tokens(region, grid, BLOCK: tl.constexpr):
    """Token numbers of a region, -1 for padding and past its end; and whether they exist: (BLOCK,) each."""
    index = tl.arange(0, BLOCK)
    exists = index < grid[0] * grid[1]
    return tl.where(exists, _token_of(region, index, grid), -1), exists


@triton.jit
def listed_tokens(regions, n_listed, start, grid, BLOCK: tl.constexpr):
    """BLOCK entries of a list of tokens: those of the first `n_listed` of `regions`, region after region.

    Args:
        regions: (slots,) int32, region numbers; the number of slots is a power of two.
        n_listed: number of regions whose tokens are listed.
        start: position in the list of the first entry to return.
        grid: the grid of the regions.
        BLOCK: number of entries to return.

    Returns:
        Token number (-1 for padding and past the list's end), whether the list has such an entry, and the
        position in `regions` of the token's region: (BLOCK,) each.
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
    """Loads the rows of the tokens `token`, (heads, tokens, BLOCK channels); 0 past HEAD_DIM and if not live.

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
    """Loads queries of an image, (heads, tokens, BLOCK_QK)."""
    base = maps.query + image * map_tokens * CONFIG.QUERY_STRIDE
    return load_heads(base, None, token, live, head, CONFIG.QUERY_STRIDE, CONFIG.QK_HEAD_DIM, CONFIG.BLOCK_QK)


@triton.jit
def load_keys_values(maps, padding, image, kv_tokens, token, live, head, CONFIG: tl.constexpr):
    """Loads keys (heads, tokens, BLOCK_QK) and values (heads, tokens, BLOCK_V) of an image."""
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
    """`x`, (heads, rows, columns), with its last two axes exchanged."""
    return tl.permute(x, (0, 2, 1))
