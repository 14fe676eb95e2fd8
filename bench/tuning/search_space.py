"""Which tile configurations an attention kernel may be given, and the problems that they are judged by.

The space is pruned by what no good configuration breaks:

- A thread holds 16 to 64 scores of a tile, in the forward up to 128. With fewer it spends its time on
  addresses, with more no registers are left for the accumulators. Of the widest heads operands and
  accumulators leave room for fewer: float32 heads of 64 spill with 16 scores a thread, and fit with 8.
- NVIDIA's pipelines have three stages: with two the compiler loads the token list that says where keys lie on
  the spot, and every step waits for it. Two are tried where nothing with three fits. Timed on an H200, two or
  three make a difference of up to 4 %, more often in favour of two; `bra-autotune` times both. From five
  stages on keys and values have two buffers, which pays in some loops: the fastest tile is timed with
  `DEEP_STAGES`, too.
- The accumulators alone take at most 192 registers of a thread.
- No program owns more rows than its size class: smaller regions would leave most of it empty.
"""

import itertools

from bra_triton.bench.problems import Problem
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, SIZES, Tile

STEPS = (16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
# One exponential in so many goes to the multiply-add units, which about evens out a loop at heads of 32: in
# the forward on sm_90, 6.9 issue slots a score while the exponential unit takes 7.3 (without it 6.0 and 8.3).
EXP_SHARE = 8
DEEP_STAGES = (5, 7)


# Each size class's (regions a side, side of a region, topk): YOLO's maps at 640, BiFormer's stages at 224.
_REGIONS = {
    16: ((7, 2, 16), (8, 3, 4), (7, 4, 4)),
    32: ((8, 5, 4), (4, 5, 8)),
    64: ((7, 7, 4), (7, 8, 1), (8, 8, 4)),
    128: ((8, 10, 4), (8, 20, 4), (8, 32, 4)),
}


def problems(size: int, head_dim: int) -> list[Problem]:
    """What the configurations of a size class are judged by."""
    return [
        Problem("", 8, n_win * side, n_win * side, 2 * head_dim, 2, n_win, topk)
        for n_win, side, topk in _REGIONS[size]
    ]


def candidates(kernel: str, bits: int, head_dim: int, num_stages: int = 3) -> list[Tile]:
    """Tiles worth trying for heads up to `head_dim`, of all size classes."""
    tiles = (
        Tile(own, step, num_warps, num_stages)
        for own, step, num_warps in itertools.product(SIZES, STEPS, WARPS)
    )
    return [tile for tile in tiles if _is_worth_trying(tile, kernel, bits, head_dim)]


def _is_worth_trying(tile: Tile, kernel: str, bits: int, head_dim: int) -> bool:
    threads = 32 * tile.num_warps
    # What a thread holds besides scores grows with the head and the element: then fewer scores fit.
    is_wide = bits == 32 or head_dim > 64
    is_small = tile.own <= 32 or is_wide or kernel == KEY_VALUE_GRADIENT
    # Three products of TF32 keep both halves of every float32 operand.
    operand_bits = head_dim * (2 * bits if bits == 32 else bits)
    fewest = min(16, 16 * 2048 // operand_bits) if is_small else 32
    most = min(32, 4 * fewest) if is_wide else 128 if kernel == FORWARD else 64
    accumulators = (2 if kernel == KEY_VALUE_GRADIENT else 1) * tile.own * head_dim / threads
    return (
        fewest <= tile.own * tile.step / threads <= most
        and (tile.own == 16 or tile.own / tile.num_warps >= 16)
        and (tile.step >= 32 or is_wide)
        and accumulators <= (128 if is_wide else 192)
    )


def serves(tile: Tile, size: int) -> bool:
    """Whether timing a tile for a size class is worth it: it owns the class's rows, or half of them."""
    return tile.own == size or 2 * tile.own == size
