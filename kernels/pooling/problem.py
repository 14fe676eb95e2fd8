"""What a pooling of regions is made of: the tensors and numbers that every backend takes. Needs no Triton."""

from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from ..arrays import A
from ..grid import RegionGrid

MEAN, MAX, WEIGHTED = "mean", "max", "weighted"
MODES = (MEAN, MAX, WEIGHTED)


@dataclass(frozen=True)
class RegionPooling(Generic[A]):
    """The tokens of every region reduced to the same cells, which may overlap and may leave tokens out.

    A cell is a span of rows times a span of columns. Tokens past the map's edge take part as any other.

    Attributes:
        row_cells: `(h', 2)` int32, contiguous: rows of a region at which each cell starts and before which it
            ends. Starts ascend, ends ascend, no cell is empty.
        column_cells: `(w', 2)` int32, likewise for columns.
        mode: `MEAN`; `MAX`, where the first maximum in row-major order gets the gradient and NaN is larger
            than all; or `WEIGHTED`, a depthwise convolution: all cells have the size of its kernel.
        grid: regions of the map.
        largest: tokens along a column and along a row of the largest cell, or more; None where that is not
            known without a look at the cells.
    """

    row_cells: A
    column_cells: A
    mode: str
    grid: RegionGrid
    largest: tuple[int, int] | None = None

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
    """What a backward returns besides the map's gradient, all float32 (float64 for float64).

    Attributes:
        fill: `(C,)`: gradient of what tokens past the map's edge hold; None where there are none.
        weight: `(C, kernel height, kernel width)`; None except for `WEIGHTED`.
        bias: `(C,)`; None except for `WEIGHTED`.
    """

    fill: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
