"""Groups of arguments that the pooling kernels take. Needs no Triton.

A group holds tensors on the host; inside a kernel its members are pointers.
"""

from typing import NamedTuple

from torch import Tensor


class Taps(NamedTuple):
    """Weight and bias of a depthwise convolution.

    Attributes:
        weight: `(KERNEL_HEIGHT * KERNEL_WIDTH, CHANNELS)` float32; PyTorch has the channels first.
        bias: `(CHANNELS,)` float32.
    """

    weight: Tensor
    bias: Tensor


class Cells(NamedTuple):
    """Where the cells of a region lie along each axis; see `RegionPooling`.

    Attributes:
        rows: `(h', 2)` int32: for each cell, the row of the region at which it starts and the first row after
            it. Both columns of this table ascend.
        columns: `(w', 2)` int32, likewise for columns.
    """

    rows: Tensor
    columns: Tensor


class Holders(NamedTuple):
    """Which cells hold each token of a region, along each axis.

    Attributes:
        rows: `(h, 2)` int32: for each row of a region, the first cell that contains the row, and the first
            cell after those that contain it.
        columns: `(w, 2)` int32, likewise for columns.
    """

    rows: Tensor
    columns: Tensor


class PoolingConfig(NamedTuple):
    """Compile-time numbers of the pooling kernels.

    Attributes:
        MODE: how a cell is reduced, one of `problem.MODES`.
        KERNEL_WIDTH: taps in a row of the convolution; 1 if there is none.
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
        BLOCK: tokens of each program.
        BLOCK_CELLS: cells that it compares in one step.
    """

    BLOCK: int
    BLOCK_CELLS: int
