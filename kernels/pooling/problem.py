"""Pooling of regions: the tensors and numbers that every backend takes. Needs no Triton."""

from dataclasses import dataclass

from torch import Tensor

from ..grid import RegionGrid

MEAN, MAX, WEIGHTED = "mean", "max", "weighted"
MODES = (MEAN, MAX, WEIGHTED)


@dataclass(frozen=True)
class RegionPooling:
    """How the tokens of every region are reduced to cells, in the same way for all regions.

    A cell is a rectangle of tokens of a region. Cells may overlap, and tokens may lie in no cell. Tokens past
    the map's edge take part like all others.

    Attributes:
        row_cells: `(h', 2)` int32, contiguous: for each cell, the row of the region at which it starts and
            the first row after it. Starts ascend, ends ascend, no cell is empty.
        column_cells: `(w', 2)` int32, likewise for columns.
        mode: `MEAN`; `MAX`, where the first maximum in row-major order gets the gradient, and NaN counts as
            larger than any number; or `WEIGHTED`, a depthwise convolution, where every cell has the size of
            the convolution's kernel.
        grid: regions of the map.
    """

    row_cells: Tensor
    column_cells: Tensor
    mode: str
    grid: RegionGrid

    @property
    def cells_high(self) -> int:
        """Cells in a column of a region, `h'`."""
        return self.row_cells.shape[0]

    @property
    def cells_wide(self) -> int:
        """Cells in a row of a region, `w'`."""
        return self.column_cells.shape[0]

    @property
    def pooled_grid(self) -> RegionGrid:
        """Regions of the pooled map; never padded."""
        return self.grid.pooled(self.cells_high, self.cells_wide)


@dataclass(frozen=True)
class PoolingGradients:
    """What a backward returns besides the map's gradient; float32, or float64 for a float64 map.

    Attributes:
        fill: `(C,)`: gradient of what tokens past the map's edge hold; None if there are no such tokens.
        weight: `(C, kernel height, kernel width)`; None except for `WEIGHTED`.
        bias: `(C,)`; None except for `WEIGHTED`.
    """

    fill: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
