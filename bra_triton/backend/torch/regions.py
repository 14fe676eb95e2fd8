"""Maps cut into dense regions and put together again, in plain PyTorch; padding is made and dropped here."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.grid import RegionGrid
from ...kernels.padding import tokens_inside
from ...kernels.problem import RoutedAttention, statistic_dtype


def by_region(x: Tensor, grid: RegionGrid, n_graphs: int = 1) -> Tensor:
    """A view of a map of whole regions: `(N, rows*h, columns*w, G*C)` to `(N, G, rows, columns, h, w, C)`.

    Args:
        x: the map.
        grid: its regions.
        n_graphs: `G`, into how many parts the channels are cut.
    """
    batch, _, _, channels = x.shape
    sides = (grid.rows, grid.region_height, grid.columns, grid.region_width)
    # einops would take three times as long, which counts where a GPU waits for its launches.
    return x.view(batch, *sides, n_graphs, channels // n_graphs).permute(0, 5, 1, 3, 2, 4, 6)


def of_images(problem: RoutedAttention[Tensor], images: slice) -> RoutedAttention[Tensor]:
    """The attention of some images."""
    if images == slice(0, problem.batch):
        return problem
    r_idx, factor, key_value = (
        None if x is None else x[images] for x in (problem.r_idx, problem.factor, problem.key_value)
    )
    query, key, value = (x[images] for x in (problem.query, problem.key, problem.value))
    return replace(
        problem, query=query, key=key, value=value, r_idx=r_idx, factor=factor, key_value=key_value
    )


def whole_map(x: Tensor, grid: RegionGrid, padding: Tensor | None = None) -> Tensor:
    """The map as one of whole regions: itself, or a copy with padding; see `pad_map`."""
    return pad_map(x, grid, padding) if grid.is_padded else x


def empty_map(
    like: Tensor, grid: RegionGrid, channels: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A map of whole regions, of the batch of `like`, and of its channels and dtype unless they are given."""
    rows, columns = grid.rows * grid.region_height, grid.columns * grid.region_width
    channels = like.shape[-1] if channels is None else channels
    return like.new_empty(like.shape[0], rows, columns, channels, dtype=dtype)


def without_padding(x: Tensor, grid: RegionGrid) -> Tensor:
    """Undoes `whole_map`: contiguous, and a tensor of its own, not a view."""
    return dense(x[:, : grid.height, : grid.width]).data if grid.is_padded else x


def write_map(target: Tensor, regions: Tensor, grid: RegionGrid, n_graphs: int = 1) -> Tensor:
    """Writes regions `(N*G*P, S*C)` to the map `(N, H, W, G*C)`, and returns the map with its padding."""
    whole = empty_map(target, grid, dtype=regions.dtype) if grid.is_padded else target
    view = by_region(whole, grid, n_graphs)
    view.copy_(regions.view(view.shape))
    if grid.is_padded:
        target.copy_(whole[:, : grid.height, : grid.width])
    return whole


def pad_map(x: Tensor, grid: RegionGrid, padding: Tensor | None = None) -> Tensor:
    """The map with its padding: `(N, H, W, C)` to `(N, rows*h, columns*w, C)`."""
    bottom, right = grid.padding
    if padding is None:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    whole = empty_map(x, grid).copy_(padding)
    whole[:, : grid.height, : grid.width] = x
    return whole


def counted_tokens(grid: RegionGrid, padding: Tensor | None, device: torch.device) -> Tensor | int:
    """How many tokens the mean of a region is over: `(P, 1)`, or all of them, where padding is given."""
    if padding is not None or not grid.is_padded:
        return grid.region_tokens
    return tokens_inside(grid, device).view(-1, 1)


def sum_over_padding(whole: Tensor, grid: RegionGrid) -> Tensor:
    """Sum over images and padding tokens of a map with its padding: `(C,)`."""
    dtype = statistic_dtype(whole.dtype)
    below, beside = whole[:, grid.height :], whole[:, : grid.height, grid.width :]
    return below.sum(dim=(0, 1, 2), dtype=dtype) + beside.sum(dim=(0, 1, 2), dtype=dtype)


def flat_index(r_idx: Tensor, n_regions: int) -> Tensor:
    """Key regions counted through all images and graphs, of `(N, G, P, topk)`."""
    batch, n_graphs = r_idx.shape[:2]
    if batch * n_graphs == 1:
        return r_idx
    stop = batch * n_graphs * n_regions
    first = torch.arange(0, stop, n_regions, device=r_idx.device, dtype=r_idx.dtype)
    return r_idx + first.view(batch, n_graphs, 1, 1)
