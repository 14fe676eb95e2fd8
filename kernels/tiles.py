"""Tile configurations of the attention kernels, as data.

A kernel "owns" a tile of rows (queries for the forward and dQ, keys for dK/dV) and walks a list in steps of
the other side. Rows past the end of a region are wasted, so the owned tile shrinks with the region.
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
    num_stages: int


FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT = "forward", "query_gradient", "key_value_gradient"


def channel_block(head_dim: int) -> int:
    """Channels that a tile holds for a head of `head_dim`: a power of two that a matrix unit can take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose(kernel: str, dtype: torch.dtype, head_dim: int, region_tokens: int) -> Tile:
    """The tile of a kernel; filled in from the compiled kernels' cost."""
    rows = min(128, max(16, 1 << (region_tokens - 1).bit_length()))
    return Tile(min(rows, 64), 32, 4, 2)
