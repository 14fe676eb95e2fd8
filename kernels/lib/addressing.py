"""Addresses of tokens: the arithmetic that kernels share.

The attention kernels do not compute which tokens a region has. They read token numbers (row-major positions
in the map, -1 for padding) from lists, as paged attention reads page tables; or they take all tokens of a map
in order, without a list. A list costs 4 bytes for each listed key, and all heads that follow the same graph
share it. Without lists, the loop would have to compute the same numbers, which costs more (issue slots per
score, forward, float16, tiles of 128 x 128, 8 warps, compiled for sm_90):

| head size | with a list | computed in the loop | dense attention |
|---|---|---|---|
| 32 | 6.45 | 7.23 | 6.39 |
| 64 | 7.00 | 8.39 | 6.83 |
"""

import triton
import triton.language as tl


@triton.jit
def locate_program(program, n_regions, tiles, NUM_HEADS: tl.constexpr):
    """The (image, region, tile, head) that one of N * n_regions * tiles * NUM_HEADS programs works on.

    Consecutive programs differ in the head, so programs that run at the same time read neighbouring channels
    of the same rows.
    """
    head = program % NUM_HEADS
    pid = program // NUM_HEADS
    tile = pid % tiles
    pid = pid // tiles
    # 64 bits, because the image's offset in the batch may exceed 2**31 elements.
    return (pid // n_regions).to(tl.int64), pid % n_regions, tile, head


@triton.jit
def graph_of(image, head, N_GRAPHS: tl.constexpr):
    """Number of the graph that a head of an image follows.

    N_GRAPHS is 0 for one graph that all images share, 1 for one graph per image, else the number of heads.
    """
    if N_GRAPHS == 0:
        graph = image * 0
    elif N_GRAPHS == 1:
        graph = image
    else:
        graph = image * N_GRAPHS + head
    return graph


@triton.jit
def corner_of(region, region_height, region_width, columns):
    """Row and column of the map at which `region` begins."""
    region_row = region // columns
    return region_row * region_height, (region - region_row * columns) * region_width


@triton.jit
def token_at(corner, index, region_width, height, width):
    """Row-major position in the map of token `index` of the region at `corner`, -1 for padding."""
    top, left = corner
    in_row = index // region_width
    row = top + in_row
    column = left + index - in_row * region_width
    return tl.where((row < height) & (column < width), row * width + column, -1)


@triton.jit
def token_of(region, index, region_height, region_width, columns, height, width):
    """Row-major position in the map of token `index` of `region`, -1 for padding."""
    corner = corner_of(region, region_height, region_width, columns)
    return token_at(corner, index, region_width, height, width)


@triton.jit
def own_tokens(region_list, region, tile, region_tokens, BLOCK: tl.constexpr, AGAIN: tl.constexpr = False):
    """The BLOCK tokens of a region that a tile owns: (index in the region, whether it exists, token number).

    The token numbers are read from the list of all regions' tokens. Without a list the whole map is the
    region, and an index is the token number. A kernel that needs the numbers again after its loop calls this
    with AGAIN: reading them a second time is cheaper than keeping them in registers during the loop.
    """
    index = tile * BLOCK + tl.arange(0, BLOCK)
    exists = index < region_tokens
    if region_list is None:
        token = tl.where(exists, index, -1)
    else:
        token = tl.load(region_list + region * region_tokens + index, mask=exists, other=-1, volatile=AGAIN)
    return index, exists, token


@triton.jit
def walked_length(region_list, region, region_tokens, list_length):
    """Entries of its list that a region processes: none if its first token, and so every one, is padding."""
    return tl.where(tl.load(region_list + region * region_tokens) < 0, 0, list_length)


@triton.jit
def places_of(token_list, position):
    """Places from which `tokens_at` reads the tokens at some positions of a list.

    They are addresses in the list, or the positions themselves if there is no list because all tokens of the
    map are taken in order. A loop adds its step to the places.
    """
    if token_list is None:
        place = position
    else:
        place = token_list + position
    return place


@triton.jit
def tokens_at(token_list, place, live):
    """Token numbers at places from `places_of`, -1 where not live; `live` is None if all are live."""
    if token_list is None:
        token = place if live is None else tl.where(live, place, -1)
    elif live is None:
        token = tl.load(place)
    else:
        token = tl.load(place, mask=live, other=-1)
    return token


@triton.jit
def load_rows(base, padding, token, channel, live, ROW_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Loads one head's channels of the tokens `token`, (tokens, channels); 0 past HEAD_DIM and if not live.

    `padding` points to the row that stands for token -1; None if no live token is -1. `live` is None if all
    tokens are live. ROW_STRIDE must be a compile-time number: otherwise the compiler cannot tell that rows
    start at multiples of 16 bytes, and loads 2 bytes at a time. For the same reason `tl.where` selects
    complete addresses, not the starts of rows (forward, head 64, sm_90: 7.3 issue slots per score instead of
    8.6).
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
    """Stores one head's channels of the live tokens among `token`, converted to the dtype of `base`."""
    tl.store(
        base + token.to(tl.int64)[:, None] * ROW_STRIDE + channel[None, :],
        rows.to(base.dtype.element_ty),
        mask=live[:, None] & (channel < HEAD_DIM)[None, :],
    )
