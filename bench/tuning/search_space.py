"""The tile configurations that are tried for an attention kernel, and the problems that they are judged by.

All good configurations follow these rules, so only such configurations are tried:

- A thread holds 16 to 64 scores of a tile, in the forward up to 128. With fewer it spends its time on
  addresses, with more no registers are left for the accumulators. With the widest heads, operands and
  accumulators leave room for fewer: float32 heads of 64 spill with 16 scores per thread, and fit with 8.
- On NVIDIA's GPUs, predictions use pipelines of three stages. With two, the compiler does not prefetch the
  token list, which says where the keys are, and every step waits for it. Two stages are predicted only if
  nothing with three fits. Timed on an H200, two and three stages differ by up to 4 %, more often in favour of
  two; therefore `bra-autotune` times both on a GPU. From five stages on, keys and values have two buffers,
  which pays in some loops: the fastest tile is also timed with `DEEP_STAGES`.
- The accumulators alone take at most 192 registers of a thread.
- No program owns more rows than its size class has: in smaller regions most of them would be empty.
"""

import itertools

from bra_triton.bench.problems import Problem
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, SIZES, Tile

STEPS = (16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
# One in EXP_SHARE exponentials is computed by the multiply-add units. With heads of 32 this about balances
# the forward on sm_90: a score takes 6.9 issue slots, 7.3 of the exponential unit (otherwise 6.0 and 8.3).
EXP_SHARE = 8
DEEP_STAGES = (5, 7)

# By size class: (n_win, side of a region, topk), from YOLO's maps at 640 and BiFormer's stages at 224 pixels.
_REGIONS = {
    16: ((7, 2, 16), (8, 3, 4), (7, 4, 4)),
    32: ((8, 5, 4), (4, 5, 8)),
    64: ((7, 7, 4), (7, 8, 1), (8, 8, 4)),
    128: ((8, 10, 4), (8, 20, 4), (8, 32, 4)),
}


def problems(size: int, head_dim: int) -> list[Problem]:
    """The problems by which the configurations of a size class are judged."""
    return [
        Problem("", 8, n_win * side, n_win * side, 2 * head_dim, 2, n_win, topk)
        for n_win, side, topk in _REGIONS[size]
    ]


def candidates(kernel: str, bits: int, head_dim: int, num_stages: int = 3) -> list[Tile]:
    """Tiles worth trying for heads up to `head_dim`, of all size classes."""
    tiles = (Tile(*sizes, num_stages) for sizes in itertools.product(SIZES, STEPS, WARPS))
    return [tile for tile in tiles if _is_worth_trying(tile, kernel, bits, head_dim)]


def _is_worth_trying(tile: Tile, kernel: str, bits: int, head_dim: int) -> bool:
    threads = 32 * tile.num_warps
    # Wide heads and elements take more registers besides the scores, so fewer scores fit.
    is_wide = bits == 32 or head_dim > 64
    is_small = tile.own <= 32 or is_wide or kernel == KEY_VALUE_GRADIENT
    # A float32 product is three in TF32, which keep two halves of every operand: twice its bits.
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
    """Whether a tile is worth timing for a size class: it owns as many rows as the class has, or half."""
    return tile.own == size or 2 * tile.own == size
