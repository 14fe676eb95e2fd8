"""Launches of LePE's kernels."""

import torch
from torch import Tensor

from ..lib.integers import cdiv
from ..lib.maps import row_stride
from ..problem import Lepe, LepeGradients
from .arguments import LepeConfig, LepeParts
from .convolution import lepe_backward_kernel, lepe_forward_kernel

# Tokens and channels of a tile, and warps. The backward's sums over tokens stay within a warp: on an H200 it
# takes 37 us at YOLO's P3 (batch 16), and 61 in the forward's tiles. The partial sums of so small tiles take
# 0.6 of a map in half precision for 3 x 3 taps; more would take several, and have the forward's tile.
FORWARD_TILE = (128, 32, 4)
BACKWARD_TILE = (32, 32, 1)
MOST_TAPS = 9


def lepe_forward(attention: Tensor, lepe: Lepe) -> Tensor:
    """Adds LePE to the attention's output.

    Args:
        attention: contiguous `(N, H, W, dim)`; float32, float16 or bfloat16.
        lepe: the convolution.

    Returns:
        `attention` plus the convolution, a new tensor of the same shape and dtype.
    """
    value, grid = lepe.value, lepe.grid
    out = torch.empty_like(attention)
    if not out.numel():
        return out
    bottom, right = grid.padding
    block_m, block_v, num_warps = FORWARD_TILE
    with torch.cuda.device_of(value):
        lepe_forward_kernel[_programs(lepe, grid.height * grid.width, FORWARD_TILE)](
            attention,
            LepeParts.of(lepe),
            out,
            *(grid.height, grid.width, grid.height + bottom, grid.width + right),
            CONFIG=LepeConfig.of(lepe, block_m, block_v),
            num_warps=num_warps,
        )
    return out


def lepe_backward(
    grad_out: Tensor, grad_value: Tensor, lepe: Lepe, needs_weight_grad: bool = True
) -> LepeGradients:
    """Adds the values' gradient into `grad_value`, in place, and returns the other gradients.

    Args:
        grad_out: contiguous `(N, H, W, dim)`, gradient of `lepe_forward`'s output.
        grad_value: `(N, H, W, dim)`, dense but for its channels; what the attention's backward wrote.
        lepe: the forward's.
        needs_weight_grad: whether weight and bias need a gradient.

    Returns:
        The gradients, float32; the same bits for the same input.
    """
    value, grid, dim, taps = lepe.value, lepe.grid, lepe.value.shape[-1], lepe.kernel_size**2
    reach_height, reach_width = lepe.reach
    tile = BACKWARD_TILE if taps <= MOST_TAPS else FORWARD_TILE
    block_m, block_v, num_warps = tile
    programs = _programs(lepe, reach_height * reach_width, tile)
    rows = (taps + 1 if needs_weight_grad else 0) + (1 if grid.is_padded else 0)
    partials = value.new_empty(programs[0], rows, dim, dtype=torch.float32)
    if value.numel():
        with torch.cuda.device_of(value):
            lepe_backward_kernel[programs](
                grad_out,
                LepeParts.of(lepe)._replace(bias=None),
                grad_value,
                partials,
                *(grid.height, grid.width, reach_height, reach_width),
                CONFIG=LepeConfig.of(lepe, block_m, block_v)._replace(
                    GRAD_STRIDE=row_stride(grad_value), NEEDS_WEIGHT_GRAD=needs_weight_grad, ROWS=rows
                ),
                num_warps=num_warps,
            )
    sums = partials.sum(0)
    return LepeGradients(
        weight=sums[:taps].t().reshape(lepe.weight.shape) if needs_weight_grad else None,
        bias=sums[taps] if needs_weight_grad and lepe.bias is not None else None,
        fill=sums[-1] if grid.is_padded else None,
    )


def _programs(lepe: Lepe, image_tokens: int, tile: tuple[int, int, int]) -> tuple[int, int]:
    """The grid of both kernels: tiles of all images, and blocks of channels."""
    batch, dim = lepe.value.shape[0], lepe.value.shape[-1]
    block_m, block_v, _ = tile
    return batch * cdiv(image_tokens, block_m), cdiv(dim, block_v)
