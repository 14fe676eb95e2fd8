"""Maps cut into dense regions and put together again, in plain PyTorch; padding is made and dropped here."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.grid import RegionGrid
from ...kernels.padding import tokens_inside
from ...kernels.problem import statistic_dtype


def by_region(x: Tensor, grid: RegionGrid, n_graphs: int = 1) -> Tensor:
    """A view of a map of whole regions: `(N, rows*h, columns*w, G*C)` to `(N, G, rows, columns, h, w, C)`.

    Args:
        x: the map.
        grid: its regions.
        n_graphs: `G`, into how many parts the channels are cut.
    """
    return rearrange(x, "n (j h) (i w) (g c) -> n g j i h w c", j=grid.rows, i=grid.columns, g=n_graphs)


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


def write_map(target: Tensor, regions: Tensor, grid: RegionGrid, n_graphs: int = 1) -> None:
    """Writes regions `(N*G*P, S, C)` to the map `(N, H, W, G*C)`, without the padding."""
    whole = empty_map(target, grid) if grid.is_padded else target
    view = by_region(whole, grid, n_graphs)
    view.copy_(regions.view(view.shape))
    if grid.is_padded:
        target.copy_(whole[:, : grid.height, : grid.width])


def pad_map(x: Tensor, grid: RegionGrid, padding: Tensor | None = None) -> Tensor:
    """The map with its padding: `(N, H, W, C)` to `(N, rows*h, columns*w, C)`."""
    bottom, right = grid.padding
    if padding is None:
        return F.pad(x, (0, 0, 0, right, 0, bottom))
    below = padding.expand(x.shape[0], bottom, x.shape[2], -1)
    beside = padding.expand(x.shape[0], x.shape[1] + bottom, right, -1)
    return torch.cat([torch.cat([x, below], 1), beside], 2)


def counted_tokens(grid: RegionGrid, padding: Tensor | None, device: torch.device) -> Tensor | int:
    """How many tokens the mean of a region is over: `(P, 1)`, or all of them, where padding is given."""
    if padding is not None or not grid.is_padded:
        return grid.region_tokens
    return tokens_inside(grid, device).view(-1, 1)


def sum_over_padding(regions: Tensor, grid: RegionGrid, n_graphs: int = 1) -> Tensor:
    """Sum over images and padding tokens of `(N*G*P, S, C)`: `(G*C,)`."""
    x = rearrange(
        regions,
        "(n g j i) (h w) c -> n (j h) (i w) (g c)",
        **{"j": grid.rows, "i": grid.columns, "g": n_graphs, "h": grid.region_height},
    )
    dtype = statistic_dtype(x.dtype)
    below, beside = x[:, grid.height :], x[:, : grid.height, grid.width :]
    return below.sum(dim=(0, 1, 2), dtype=dtype) + beside.sum(dim=(0, 1, 2), dtype=dtype)


def flat_index(r_idx: Tensor, n_regions: int) -> Tensor:
    """Rows of all graphs' regions: `(N, G, P, topk)` to `(N*G*P, topk)`."""
    batch, n_graphs = r_idx.shape[:2]
    stop = batch * n_graphs * n_regions
    first = torch.arange(0, stop, n_regions, device=r_idx.device, dtype=r_idx.dtype)
    return (r_idx.flatten(0, 1) + first[:, None, None]).flatten(0, 1)
