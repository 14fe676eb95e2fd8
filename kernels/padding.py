"""Gradients of region means and of the packed row that all padding tokens hold, in plain PyTorch.

The gradient of that row is the sum of several shares.
"""

import torch
from torch import Tensor

from .grid import RegionGrid
from .problem import PackedAttention, statistic_dtype


def tokens_inside(grid: RegionGrid, device: torch.device) -> Tensor:
    """Number of tokens of each region that are not padding, `(rows, columns)`; counted on the device."""
    inside = []
    for count, region_side, side in (
        (grid.rows, grid.region_height, grid.height),
        (grid.columns, grid.region_width, grid.width),
    ):
        first = torch.arange(count, device=device) * region_side
        inside.append((side - first).clamp(0, region_side))
    return inside[0][:, None] * inside[1]


def counted_tokens(grid: RegionGrid, counts_padding: bool, device: torch.device) -> Tensor | int:
    """The number of tokens that a region's mean is taken over.

    All tokens of a region if padding counts or the map needs none; otherwise those inside the map, `(P, 1)`.
    """
    if counts_padding or not grid.is_padded:
        return grid.region_tokens
    return tokens_inside(grid, device).view(-1, 1)


def region_means_gradient(grad: Tensor, counts_padding: bool, grid: RegionGrid) -> Tensor:
    """Gradient of the map whose region means have the gradient `grad`.

    Args:
        grad: `(N, P, C)`.
        counts_padding: whether tokens past the map's edge take part in the means.
        grid: the regions.

    Returns:
        `(N, H, W, C)`; may be a view.
    """
    per_token = grad / counted_tokens(grid, counts_padding, grad.device)
    per_token = per_token.unflatten(1, (grid.rows, grid.columns))
    tokens = per_token[:, :, None, :, None].expand(-1, -1, grid.region_height, -1, grid.region_width, -1)
    return tokens.flatten(3, 4).flatten(1, 2)[:, : grid.height, : grid.width]


def share_of_means(grad_means: Tensor, grid: RegionGrid) -> Tensor:
    """Gradient `(C,)` that padding gets from the region means; `grad_means` is `(N, P, C)`."""
    n_padded = (grid.region_tokens - tokens_inside(grid, grad_means.device)).view(-1, 1)
    return (grad_means * n_padded).sum((0, 1)) / grid.region_tokens


def padding_gradient(
    problem: PackedAttention[Tensor],
    of_keys_values: tuple[Tensor, Tensor] | None,
    of_lepe: Tensor | None,
    grad_means: Tensor | None,
) -> Tensor:
    """Gradient of the packed row of padding.

    Args:
        problem: the attention, with padding.
        of_keys_values: `(qk_dim,)` and `(dim,)`, float32 at least: the attention's share; None for 0.
        of_lepe: `(dim,)`: LePE's share; None for 0.
        grad_means: `(N, P, 2*qk_dim)`: gradient of the region means, in which padding has a share if it
            counts; None for 0.
    """
    padding, settings, qk_dim = problem.padding, problem.settings, problem.settings.qk_dim
    assert padding is not None
    dtype = statistic_dtype(padding.dtype)
    zeros = padding.new_zeros(qk_dim, dtype=dtype)
    key, value = of_keys_values or (zeros, padding.new_zeros(problem.dim, dtype=dtype))
    total = torch.cat((zeros, key, value if of_lepe is None else value + of_lepe))
    if grad_means is not None and problem.means is None and settings.counts_padding:
        total[: 2 * qk_dim].add_(share_of_means(grad_means, settings.grid))
    return total.to(padding.dtype)
