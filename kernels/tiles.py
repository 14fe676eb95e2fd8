"""Tile configurations of the attention kernels, as data.

A kernel "owns" a tile of rows (queries for the forward and dQ, keys for dK/dV) and walks a list in steps of
the other side. Rows past the end of a region are wasted, so the owned tile shrinks with the region.

The table is predicted, not measured: of the tiles that spill no register on sm_80 and sm_90 (compiled with
Triton 3.8), the one with the fewest issue slots per score. Float32 heads past 32 and half-precision heads
past 128 have tiles that spill, the best of those tried.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program computes and with how many threads.

    Attributes:
        own: rows that the program owns, a power of two of at least 16.
        step: list positions in one step of its loop, a power of two of at least 16.
        num_warps: warps of 32 threads.
        num_stages: depth of the software pipeline.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int = 2


FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT = "forward", "query_gradient", "key_value_gradient"

# (kernel, bits of an element) -> widest head, up to the next power of two -> tiles by owned rows.
TABLE = {
    (FORWARD, 16): {
        32: (Tile(16, 32, 1), Tile(32, 32, 1), Tile(64, 128, 4), Tile(128, 128, 8)),
        64: (Tile(16, 64, 2), Tile(32, 64, 2), Tile(64, 128, 4), Tile(128, 128, 8)),
        128: (Tile(16, 64, 2), Tile(32, 64, 4), Tile(64, 64, 8), Tile(128, 32, 8)),
        256: (Tile(16, 32, 4),),
    },
    (QUERY_GRADIENT, 16): {
        32: (Tile(16, 32, 1), Tile(32, 64, 2), Tile(64, 64, 4), Tile(128, 64, 4)),
        64: (Tile(16, 64, 2), Tile(32, 64, 2), Tile(64, 64, 4), Tile(128, 64, 8)),
        128: (Tile(16, 128, 4), Tile(32, 32, 4)),
        256: (Tile(16, 32, 4),),
    },
    # Steps of at least half as many queries as threads: with fewer, Triton 3.6 computes the addresses of the
    # statistics anew in every thread (128 x 64, 8 warps, sm_90: 21.7 issue slots a score, 9.8 with 3.8).
    (KEY_VALUE_GRADIENT, 16): {
        32: (Tile(16, 32, 1), Tile(32, 32, 1), Tile(64, 64, 4)),
        64: (Tile(16, 64, 2), Tile(32, 128, 4), Tile(64, 32, 4), Tile(128, 32, 8)),
        128: (Tile(16, 128, 4),),
        256: (Tile(16, 32, 4),),
    },
    (FORWARD, 32): {
        32: (Tile(16, 32, 2), Tile(32, 32, 2), Tile(64, 32, 4)),
        64: (Tile(16, 16, 2), Tile(32, 16, 4), Tile(64, 16, 4)),
        256: (Tile(16, 16, 4),),
    },
    (QUERY_GRADIENT, 32): {
        32: (Tile(16, 32, 2), Tile(32, 32, 2), Tile(64, 16, 4)),
        64: (Tile(16, 16, 2), Tile(32, 16, 4), Tile(64, 16, 4)),
        256: (Tile(16, 16, 4),),
    },
    (KEY_VALUE_GRADIENT, 32): {
        32: (Tile(16, 16, 2), Tile(32, 16, 2), Tile(64, 16, 4)),
        64: (Tile(16, 16, 4), Tile(32, 16, 4)),
        256: (Tile(16, 16, 8),),
    },
}


def channel_block(head_dim: int) -> int:
    """Channels that a tile holds for a head of `head_dim`: a power of two that a matrix unit can take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose(kernel: str, dtype: torch.dtype, head_dim: int, region_tokens: int) -> Tile:
    """The tile for a problem: the smallest that holds a region, or the largest there is.

    Args:
        kernel: `FORWARD`, `QUERY_GRADIENT` or `KEY_VALUE_GRADIENT`.
        dtype: float32, float16 or bfloat16.
        head_dim: the wider of a head's queries and values, at most 256.
        region_tokens: tokens in a region, `S`.
    """
    by_head = TABLE[kernel, 8 * dtype.itemsize]
    tiles = by_head[min(width for width in by_head if width >= head_dim)]
    return next((tile for tile in tiles if tile.own >= region_tokens), tiles[-1])
