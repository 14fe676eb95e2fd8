"""Launches of LePE's kernels, added to a plan."""

from dataclasses import dataclass

import torch

from ..arrays import Buffer
from ..lib.integers import cdiv
from ..lib.maps import row_stride
from ..plan import Plan
from ..problem import Lepe
from .arguments import LepeConfig, LepeParts, LepeSums, LepeSumsConfig
from .convolution import lepe_backward_kernel, lepe_forward_kernel

# Tokens of a tile, channels of a tile, and warps. The backward's tile has one warp, so that its sums over
# tokens stay within a warp: on an H200 the backward takes 37 us at YOLO's P3, and 61 us in the forward's tile
# (docs/kernel_times.md). Small tiles make many shares: for 3 x 3 taps the shares take 0.6 times the memory of
# a half-precision map. For 5 x 5 taps they would take 1.6 times as much as a map, so with more than MOST_TAPS
# taps the backward uses the forward's tile.
FORWARD_TILE = (128, 32, 4)
BACKWARD_TILE = (32, 32, 1)
MOST_TAPS = 9
# Shares in a step of `sum_lepe_shares`, and channels. The sum has few programs, so each must have many loads
# in flight: on an H100 this tile was faster than 256 shares and 16 channels (`bra-bench kernel-times`).
_SUM_TILE = (1024, 8)


@dataclass(frozen=True)
class LepeShares:
    """The shares that LePE's backward writes, and the arguments with which `launch_finish` sums them.

    Attributes:
        shares: `(programs, rows, dim)` float32.
        sums: where the sums go.
        config: compile-time numbers of `sum_lepe_shares`.
        n_sums: number of programs of `sum_lepe_shares`.
    """

    shares: Buffer
    sums: LepeSums
    config: LepeSumsConfig
    n_sums: int


def launch_lepe(plan: Plan, attention: Buffer, lepe: Lepe[Buffer], out: Buffer) -> None:
    """Adds the launch that computes the attention's output plus LePE.

    Args:
        plan: where to add it.
        attention: the attention's output, contiguous `(N, H, W, dim)`; float32, float16 or bfloat16.
        lepe: the convolution.
        out: where the sum goes, of the same shape and dtype.
    """
    grid = lepe.grid
    bottom, right = grid.padding
    block_m, block_v, num_warps = FORWARD_TILE
    plan.launch(
        lepe_forward_kernel,
        _programs(lepe, grid.height * grid.width, FORWARD_TILE),
        (attention, LepeParts.of(lepe), out),
        (
            *(grid.height, grid.width, grid.height + bottom, grid.width + right),
            LepeConfig.of(lepe, block_m, block_v),
        ),
        num_warps=num_warps,
    )


def launch_lepe_gradient(
    plan: Plan,
    grad_out: Buffer,
    grad_value: Buffer,
    lepe: Lepe[Buffer],
    sums: LepeSums,
    adds_to_grad: bool = False,
) -> LepeShares | None:
    """Adds the launch of LePE's backward: the values' gradient, and shares of the other gradients.

    Args:
        plan: where to add it.
        grad_out: gradient of the output, contiguous `(N, H, W, dim)`.
        grad_value: where the values' gradient goes: `(N, H, W, dim)`, dense except for its channels.
        lepe: the forward's convolution.
        sums: where the gradients of weight, bias and fill are to go.
        adds_to_grad: whether to add to `grad_value`, which then already holds the attention's share.

    Returns:
        The shares that `launch_finish` has still to sum; None if all members of `sums` are None.
    """
    grid, dim, taps = lepe.grid, lepe.value.shape[-1], lepe.kernel_size**2
    reach_height, reach_width = lepe.reach
    tile = BACKWARD_TILE if taps <= MOST_TAPS else FORWARD_TILE
    block_m, block_v, num_warps = tile
    programs = _programs(lepe, reach_height * reach_width, tile)
    has_taps = sums.weight is not None or sums.bias is not None
    rows = (taps + 1 if has_taps else 0) + (1 if grid.is_padded else 0)
    shares = plan.scratch((programs[0], rows, dim), torch.float32)
    plan.launch(
        lepe_backward_kernel,
        programs,
        (grad_out, LepeParts.of(lepe)._replace(bias=None), grad_value, shares),
        (
            *(grid.height, grid.width, reach_height, reach_width),
            LepeConfig.of(lepe, block_m, block_v)._replace(
                GRAD_STRIDE=row_stride(grad_value),
                NEEDS_WEIGHT_GRAD=has_taps,
                ROWS=rows,
                ADDS_TO_GRAD=adds_to_grad,
            ),
        ),
        num_warps=num_warps,
    )
    if not has_taps and sums.fill is None:
        return None
    block_p, block_c = _SUM_TILE
    config = LepeSumsConfig(dim, taps, rows, has_taps, block_p, block_c, HAS_PIECES=False)
    return LepeShares(shares, sums, config, rows * cdiv(dim, block_c))


def _programs(lepe: Lepe[Buffer], image_tokens: int, tile: tuple[int, int, int]) -> tuple[int, int]:
    """Grid of LePE's kernels: the number of tiles in all images, and the number of channel blocks."""
    batch, dim = lepe.value.shape[0], lepe.value.shape[-1]
    block_m, block_v, _ = tile
    return batch * cdiv(image_tokens, block_m), cdiv(dim, block_v)
