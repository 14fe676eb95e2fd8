"""Groups of arguments that the pooling kernels take. Does not import Triton.

A group of pointers holds buffers on the host and pointers in a kernel.
"""

from typing import NamedTuple

from ..arrays import Buffer


class Taps(NamedTuple):
    """A depthwise convolution.

    Attributes:
        weight: `(KERNEL_HEIGHT, KERNEL_WIDTH, CHANNELS)` float32.
        bias: `(CHANNELS,)` float32.
    """

    weight: Buffer
    bias: Buffer


class Cells(NamedTuple):
    """The cells of a region, in one table for each axis; see `RegionPooling`.

    Attributes:
        rows: `(h', 2)` int32, the row of a region at which each cell starts, and the first row past the cell;
            both ascend.
        columns: `(w', 2)` int32, likewise for columns.
    """

    rows: Buffer
    columns: Buffer


class Holders(NamedTuple):
    """The cells that contain each token of a region, in one table for each axis.

    Attributes:
        rows: `(h, 2)` int32, for each row of tokens the first cell that contains it, and the first cell after
            those that do.
        columns: `(w, 2)` int32, likewise for columns.
    """

    rows: Buffer
    columns: Buffer


class PoolingConfig(NamedTuple):
    """Compile-time numbers of the pooling kernels.

    Attributes:
        MODE: how a cell is reduced, see `problem.RegionPooling`.
        KERNEL_WIDTH: taps in a row of the convolution; 1 without one.
        TOKEN_STRIDE: elements from one token of the map to the next.
        CHANNELS: channels of a token.
        BLOCK_T: tokens of a tile.
        BLOCK_C: channels of a tile.
    """

    MODE: str
    KERNEL_WIDTH: int
    TOKEN_STRIDE: int
    CHANNELS: int
    BLOCK_T: int
    BLOCK_C: int


class InvertConfig(NamedTuple):
    """Compile-time numbers of `invert_cells_kernel`.

    Attributes:
        BLOCK: tokens of a program.
        BLOCK_CELLS: cells of a step.
    """

    BLOCK: int
    BLOCK_CELLS: int
