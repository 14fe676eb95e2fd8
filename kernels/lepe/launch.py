"""Launches of LePE's kernels, added to a plan."""

from dataclasses import dataclass

import torch

from ..arrays import Buffer
from ..lib.integers import cdiv
from ..lib.maps import row_stride
from ..plan import Plan
from ..problem import Lepe
from .arguments import LepeConfig, LepeParts, LepeSums, LepeSumsConfig
from .convolution import lepe_backward_kernel, lepe_forward_kernel, lepe_sums_kernel

# Tokens and channels of a tile, and warps. The backward's sums over tokens stay within a warp: on an H200 it
# takes 37 us at YOLO's P3 (batch 16), and 61 in the forward's tiles. The partial sums of so small tiles take
# 0.6 of a map in half precision for 3 x 3 taps; more would take several, and have the forward's tile.
FORWARD_TILE = (128, 32, 4)
BACKWARD_TILE = (32, 32, 1)
MOST_TAPS = 9
# Programs' shares and channels in a step of their sum.
_SUM_TILE = (256, 16)


@dataclass(frozen=True)
class LepeGradients:
    """Where the gradients of LePE's parameters go; None where one is not asked for.

    Attributes:
        weight: `(dim, 1, k, k)`, contiguous.
        bias: `(dim,)`.
        fill: `(dim,)` float32.
    """

    weight: Buffer | None
    bias: Buffer | None
    fill: Buffer | None


def launch_lepe(plan: Plan, attention: Buffer, lepe: Lepe[Buffer], out: Buffer) -> None:
    """Adds LePE on top of the attention's output.

    Args:
        plan: where to add it.
        attention: contiguous `(N, H, W, dim)`; float32, float16 or bfloat16.
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
    plan: Plan, grad_out: Buffer, grad_value: Buffer, lepe: Lepe[Buffer], gradients: LepeGradients
) -> None:
    """Adds the values' gradient into `grad_value`, in place, and the parameters' gradients.

    Args:
        plan: where to add them.
        grad_out: contiguous `(N, H, W, dim)`.
        grad_value: `(N, H, W, dim)`, dense except for its channels; what the attention's backward wrote.
        lepe: the forward's.
        gradients: where those of the parameters go.
    """
    grid, dim, taps = lepe.grid, lepe.value.shape[-1], lepe.kernel_size**2
    reach_height, reach_width = lepe.reach
    tile = BACKWARD_TILE if taps <= MOST_TAPS else FORWARD_TILE
    block_m, block_v, num_warps = tile
    programs = _programs(lepe, reach_height * reach_width, tile)
    needs_weight = gradients.weight is not None or gradients.bias is not None
    rows = (taps + 1 if needs_weight else 0) + (1 if grid.is_padded else 0)
    partials = plan.scratch((programs[0], rows, dim), torch.float32)
    plan.launch(
        lepe_backward_kernel,
        programs,
        (grad_out, LepeParts.of(lepe)._replace(bias=None), grad_value, partials),
        (
            *(grid.height, grid.width, reach_height, reach_width),
            LepeConfig.of(lepe, block_m, block_v)._replace(
                GRAD_STRIDE=row_stride(grad_value), NEEDS_WEIGHT_GRAD=needs_weight, ROWS=rows
            ),
        ),
        num_warps=num_warps,
    )
    if needs_weight or gradients.fill is not None:
        block_p, block_c = _SUM_TILE
        plan.launch(
            lepe_sums_kernel,
            (rows, cdiv(dim, block_c)),
            (partials, LepeSums(gradients.weight, gradients.bias, gradients.fill)),
            (programs[0], LepeSumsConfig(dim, taps, rows, needs_weight, block_p, block_c)),
            num_warps=4,
        )


def _programs(lepe: Lepe[Buffer], image_tokens: int, tile: tuple[int, int, int]) -> tuple[int, int]:
    """The grid of both kernels: tiles of all images, and blocks of channels."""
    batch, dim = lepe.value.shape[0], lepe.value.shape[-1]
    block_m, block_v, _ = tile
    return batch * cdiv(image_tokens, block_m), cdiv(dim, block_v)
