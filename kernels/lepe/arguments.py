"""Groups of arguments that the kernels with LePE take. Needs no Triton."""

from typing import NamedTuple

from ..arrays import Buffer
from ..lib.maps import row_stride
from ..problem import Lepe


class LepeParts(NamedTuple):
    """The tensors of LePE: buffers on the host, pointers in a kernel.

    Attributes:
        value: `(N, H, W, DIM)`, the values, tokens `VALUE_STRIDE` elements apart in a packed map.
        weight: `(DIM, KERNEL * KERNEL)`, which is PyTorch's `(DIM, 1, KERNEL, KERNEL)`.
        fill: `(DIM,)`, value of every padding token; None if the map is not padded.
        bias: `(DIM,)`; None for none, and in the backward, which does not read it.
    """

    value: Buffer
    weight: Buffer
    fill: Buffer | None
    bias: Buffer | None

    @classmethod
    def of(cls, lepe: Lepe[Buffer]) -> "LepeParts":
        """The tensors of `lepe`."""
        return cls(lepe.value, lepe.weight, lepe.fill, lepe.bias)


class LepeConfig(NamedTuple):
    """Compile-time numbers of LePE's kernels.

    Attributes:
        DIM: channels of the values.
        VALUE_STRIDE: elements from one token of the values to the next.
        KERNEL: side of the convolution, odd.
        BLOCK_M: tokens of a tile.
        BLOCK_V: channels of a tile.
        GRAD_STRIDE: backward alone: elements from one token of the values' gradient to the next.
        NEEDS_WEIGHT_GRAD: backward alone: compute the gradients of weight and bias.
        ROWS: backward alone: rows of `shares`.
        ADDS_TO_GRAD: backward alone: add to the values' gradient, which already holds the attention's share.
    """

    DIM: int
    VALUE_STRIDE: int
    KERNEL: int
    BLOCK_M: int
    BLOCK_V: int
    GRAD_STRIDE: int = 0
    NEEDS_WEIGHT_GRAD: bool = False
    ROWS: int = 0
    ADDS_TO_GRAD: bool = False

    @classmethod
    def of(cls, lepe: Lepe[Buffer], block_m: int, block_v: int) -> "LepeConfig":
        """The numbers that both kernels take; those of the backward alone have their defaults."""
        return cls(lepe.value.shape[-1], row_stride(lepe.value), lepe.kernel_size, block_m, block_v)


class LepeSums(NamedTuple):
    """Where the summed shares go, the gradients of these tensors; None if a gradient is not asked for.

    Attributes:
        weight: `(DIM, KERNEL * KERNEL)`.
        bias: `(DIM,)`.
        fill: `(DIM,)` float32.
    """

    weight: Buffer | None
    bias: Buffer | None
    fill: Buffer | None


class LepeSumsConfig(NamedTuple):
    """Compile-time numbers of `sum_lepe_shares`.

    Attributes:
        DIM: channels of the values.
        TAPS: elements of the convolution's kernel.
        ROWS: rows of `shares`.
        HAS_TAPS: the first TAPS + 1 rows of `shares` belong to weight and bias.
        BLOCK_P: shares in a step; each was written by one program.
        BLOCK_C: channels of a program.
        HAS_PIECES: for `finish_gradients_kernel`: rows of the inverse graph may have been cut.
    """

    DIM: int
    TAPS: int
    ROWS: int
    HAS_TAPS: bool
    BLOCK_P: int
    BLOCK_C: int
    HAS_PIECES: bool
