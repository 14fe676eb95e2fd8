"""Cuts maps into regions and puts them together again, in plain PyTorch; also adds and removes padding."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.grid import RegionGrid
from ...kernels.problem import RoutedAttention, statistic_dtype


def by_region(x: Tensor, grid: RegionGrid, n_graphs: int) -> Tensor:
    """A view of a map of whole regions: `(N, rows*h, columns*w, G*C)` to `(N, G, rows, columns, h, w, C)`.

    Args:
        x: the map.
        grid: its regions.
        n_graphs: `G`, into how many parts the channels are cut.
    """
    batch, _, _, channels = x.shape
    sides = (grid.rows, grid.region_height, grid.columns, grid.region_width)
    # einops would take three times as long, which matters where a GPU waits for its launches.
    return x.view(batch, *sides, n_graphs, channels // n_graphs).permute(0, 5, 1, 3, 2, 4, 6)


def of_images(problem: RoutedAttention[Tensor], images: slice) -> RoutedAttention[Tensor]:
    """The same problem for a slice of its images."""
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
    """The map extended to whole regions, `(N, rows*h, columns*w, C)`: `x` itself, or a copy with padding.

    Tokens past the edge hold `padding`, `(C,)`, or 0 if it is None.
    """
    if not grid.is_padded:
        return x
    bottom, right = grid.padding
    if padding is None:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    whole = empty_map(x, grid).copy_(padding)
    whole[:, : grid.height, : grid.width] = x
    return whole


def empty_map(like: Tensor, grid: RegionGrid, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised map of whole regions, `(N, rows*h, columns*w, C)`.

    `N` and `C` are those of `like`, and so is `dtype` unless it is given.
    """
    rows, columns = grid.rows * grid.region_height, grid.columns * grid.region_width
    return like.new_empty(like.shape[0], rows, columns, like.shape[-1], dtype=dtype)


def write_map(target: Tensor, regions: Tensor, grid: RegionGrid, n_graphs: int) -> Tensor:
    """Writes regions `(N*G*P, S*C)` to the map `(N, H, W, G*C)`, and returns the map with its padding."""
    whole = empty_map(target, grid, dtype=regions.dtype) if grid.is_padded else target
    view = by_region(whole, grid, n_graphs)
    view.copy_(regions.view(view.shape))
    if grid.is_padded:
        target.copy_(whole[:, : grid.height, : grid.width])
    return whole


def sum_over_padding(whole: Tensor, grid: RegionGrid) -> Tensor:
    """Sum over all images and padding tokens of a map with its padding: `(C,)`, float32 or float64."""
    dtype = statistic_dtype(whole.dtype)
    below, beside = whole[:, grid.height :], whole[:, : grid.height, grid.width :]
    return below.sum(dim=(0, 1, 2), dtype=dtype) + beside.sum(dim=(0, 1, 2), dtype=dtype)


def flat_index(r_idx: Tensor, n_regions: int) -> Tensor:
    """Changes the region numbers in `r_idx`, `(N, G, P, topk)`, to numbers through all images and graphs."""
    batch, n_graphs = r_idx.shape[:2]
    if batch * n_graphs == 1:
        return r_idx
    stop = batch * n_graphs * n_regions
    first = torch.arange(0, stop, n_regions, device=r_idx.device, dtype=r_idx.dtype)
    return r_idx + first.view(batch, n_graphs, 1, 1)
