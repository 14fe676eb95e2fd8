"""The tensors and numbers of a pooling of regions, which every backend takes. Does not import Triton."""

from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from ..arrays import A
from ..grid import RegionGrid

MEAN, MAX, WEIGHTED = "mean", "max", "weighted"


@dataclass(frozen=True)
class RegionPooling(Generic[A]):
    """A reduction of the tokens of every region to cells.

    A cell is a span of rows times a span of columns. All regions have the same cells; these may overlap, and
    may leave tokens out. Tokens past the map's edge take part like any other.

    Attributes:
        row_cells: `(h', 2)` int32, contiguous: the row of a region at which each cell starts, and the row
            before which it ends. Starts ascend, ends ascend, no cell is empty.
        column_cells: `(w', 2)` int32, likewise for columns.
        mode: `MEAN`; `MAX`, where the first maximum in row-major order gets the gradient and NaN is larger
            than all numbers; or `WEIGHTED`, a depthwise convolution: all cells have the size of its kernel.
        grid: regions of the map.
        largest: upper bounds of the height and of the width of all cells, in tokens; None if unknown: then
            the tables of cells must be read to find them.
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
    """Gradients that a backward returns besides the map's; float32, or float64 for a float64 map.

    Attributes:
        fill: `(C,)`: gradient of what tokens past the map's edge hold; None where there are none.
        weight: `(C, kernel height, kernel width)`; None except for `WEIGHTED`.
        bias: `(C,)`; None except for `WEIGHTED`.
    """

    fill: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
