"""Down-sampling of keys and values inside each region: a class for each mode, with two ways to one result.

`pool` runs on a fused backend and reads keys and values from the packed projection without a copy. `forward`
is plain differentiable PyTorch on regions cut out of the map, for the reference and for export. Both take the
places of a region's cells from `cells`.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import at_least_one, one_of, whole
from ..cells import Cells, fractional_cells, mean_matrix, window_maxima
from ..export import being_exported, is_eager
from ..kernels.bounded import Bounded
from ..kernels.grid import RegionGrid, is_sure, larger
from ..kernels.pooling.problem import MAX, MEAN, WEIGHTED
from ..operators import pooling as operators
from ..operators.library import is_seen
from .layers import is_plain, is_plain_window

MODES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool", "fracpool", "conv")
# The modes that use each number.
USED_BY = {
    "kv_per_win": ("ada_avgpool", "ada_maxpool"),
    "kv_downsample_ratio": ("avgpool", "maxpool", "fracpool", "conv"),
    "kv_downsample_kernel": ("fracpool", "conv"),
}
# Attributes of the modules that determine their parameters, or other attributes.
FIXED = ("qk_dim", "dim", "mode", "kv_per_win", "ratio", "kernel")
# Random samples are multiples of 1 / SAMPLE_STEPS, which float32 adds to whole numbers without rounding.
# Rounding could move the start of a cell by one token and so leave a token in no cell.
SAMPLE_STEPS = 1024
# Tables of fixed cells; a key holds everything that its table depends on.
_kept: dict[tuple[object, ...], Tensor] = Bounded()


def build(
    mode: str, qk_dim: int, dim: int, kv_per_win: int = 4, ratio: float = 4, kernel: int | None = None
) -> "nn.Identity | KVDownsampling":
    """The module for a `kv_downsample_mode`; `nn.Identity` if nothing is reduced.

    Args:
        mode: one of `MODES`.
        qk_dim: channels of the keys.
        dim: channels of the values.
        kv_per_win: cells along each side of a region, for `"ada_avgpool"` and `"ada_maxpool"`.
        ratio: window and stride of `"avgpool"` and `"maxpool"`; stride of `"conv"`; for `"fracpool"` the
            factor by which a side shrinks, not necessarily a whole number.
        kernel: window of `"fracpool"`, by default the smallest whose cells cover all tokens; kernel of
            `"conv"`, by default `ratio`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    one_of("kv_downsample_mode", mode, MODES)
    if mode in ("ada_avgpool", "ada_maxpool"):
        return AdaptivePooling(qk_dim, dim, MEAN if mode == "ada_avgpool" else MAX, kv_per_win)
    if mode in ("avgpool", "maxpool") and _whole(ratio) > 1:
        return WindowPooling(qk_dim, dim, MEAN if mode == "avgpool" else MAX, _whole(ratio))
    if mode == "fracpool":
        return FractionalMaxPooling(qk_dim, dim, ratio, kernel)
    if mode == "conv":
        return DepthwiseConvolution(qk_dim, dim, _whole(ratio), kernel)
    return nn.Identity()


class KVDownsampling(nn.Module, ABC):
    """The base class of the modes. Setting an attribute that `FIXED` names raises AttributeError.

    Args:
        qk_dim: channels of the keys.
        dim: channels of the values.
        mode: `MEAN`, `MAX` or `WEIGHTED`.
    """

    def __init__(self, qk_dim: int, dim: int, mode: str) -> None:
        super().__init__()
        self.qk_dim = whole("qk_dim", qk_dim)
        self.dim = whole("dim", dim)
        self.mode = mode

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in vars(self):
            raise AttributeError(
                f"{name} cannot be set, got {value!r}: make a new module by downsampling.build(...)"
            )
        super().__setattr__(name, value)

    @abstractmethod
    def count(self, side: int) -> int:
        """Number of cells along a region's side of `side` tokens; raises ValueError if no cell fits."""

    @abstractmethod
    def largest(self, side: int) -> int:
        """Upper bound of the tokens of a cell along a region's side of `side` tokens."""

    @abstractmethod
    def cells(self, height: int, width: int, device: torch.device) -> Cells:
        """Places of the cells in a region of `height` x `width` tokens; in training `"fracpool"` draws them.

        Returns:
            `(h', 2)` and `(w', 2)` int32: start and end of each cell, along the height and along the width.
        """

    def kv_grid(self, grid: RegionGrid) -> RegionGrid:
        """The regions on the reduced map of keys and values, for a map whose regions are `grid`."""
        return grid.pooled(self.count(grid.region_height), self.count(grid.region_width))

    def packed_parameters(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Weight `(qk_dim + dim, kernel, kernel)` and bias `(qk_dim + dim,)`, keys first; or None, None."""
        return None, None

    def pool(self, qkv: Tensor, grid: RegionGrid, fill: Tensor | None = None, *, backend: str) -> Tensor:
        """Reduces keys and values, which it reads from the packed projection without a copy; differentiable.

        Args:
            qkv: `(N, H, W, 2*qk_dim + dim)`, contiguous.
            grid: the regions of the map.
            fill: `(2*qk_dim + dim,)`: the packed row of every token past the map's edge; zeros by default.
            backend: "triton" or "torch".

        Returns:
            Keys and values side by side, `(N, H', W', qk_dim + dim)` under `kv_grid(grid)`, contiguous.
        """
        try:
            row_cells, column_cells = self.cells(grid.region_height, grid.region_width, qkv.device)
        except ValueError as error:
            size, regions = f"{grid.height} x {grid.width}", f"{grid.rows} x {grid.columns}"
            raise ValueError(f"{error}; the map has {size} tokens and {regions} regions (n_win)") from None
        weight, bias = self.packed_parameters()
        if weight is not None and weight.device != qkv.device:
            raise ValueError(
                f"kv_downsampling must be on qkv's device, {qkv.device}, got parameters on {weight.device}"
            )
        largest = [self.largest(grid.region_height), self.largest(grid.region_width)]
        pooled, _ = operators.pool(
            *(qkv, fill, row_cells, column_cells, weight, bias),
            *(largest, self.qk_dim, grid.numbers, self.mode, backend),
        )
        return pooled

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Reduces regions that were cut out of the map, in plain differentiable PyTorch.

        Args:
            x: `(B, qk_dim + dim, h, w)`: keys and values of regions.

        Returns:
            `(B, qk_dim + dim, h', w')`.
        """


class FixedCells(KVDownsampling):
    """The base class of the modes whose cells depend on nothing but the sides of a region."""

    def cells(self, height: int, width: int, device: torch.device) -> Cells:
        """See `KVDownsampling.cells`. Later calls return the same tensors: do not change them in place."""
        rows = self._kept_along(height, device)
        return rows, rows if is_sure(height == width) else self._kept_along(width, device)

    def _kept_along(self, side: int, device: torch.device) -> Tensor:
        """The table `_along`, computed once: it takes up to nine operators, each of them a launch on a GPU.

        While a graph is recorded, or something observes operators (`is_seen`), every call computes the table.
        Each stream has its own tables, because streams do not wait for each other. Inference mode also has
        its own, because a backward cannot save its tensors.
        """
        device, stream = torch.device(device), 0
        if not is_eager() or is_seen(()):
            return self._along(side, device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return self._along(side, device)
            current = torch.cuda.current_stream(device)
            device, stream = current.device, current.cuda_stream
        key = (type(self), self.numbers, side, device, stream, torch.is_inference_mode_enabled())
        found = _kept.get(key)  # looked up only once: another thread may empty `_kept` at any time
        if found is None:
            found = _kept[key] = self._along(side, device)
        return found

    @property
    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """The numbers that, besides the side, determine the cells."""

    @abstractmethod
    def _along(self, side: int, device: torch.device) -> Tensor:
        """Start and end of each cell along a side, `(cells, 2)` int32."""


class AdaptivePooling(FixedCells):
    """`"ada_avgpool"`, `"ada_maxpool"`: `kv_per_win` cells per side, nearly equal; they may overlap."""

    def __init__(self, qk_dim: int, dim: int, mode: str, kv_per_win: int) -> None:
        super().__init__(qk_dim, dim, mode)
        self.kv_per_win = whole("kv_per_win", kv_per_win)

    def count(self, side: int) -> int:
        """`kv_per_win`."""
        return self.kv_per_win

    @property
    def numbers(self) -> tuple[int, ...]:
        """Cells per side."""
        return (self.kv_per_win,)

    def largest(self, side: int) -> int:
        """See `KVDownsampling`."""
        return side // self.kv_per_win + 2

    def _along(self, side: int, device: torch.device) -> Tensor:
        index = torch.arange(self.kv_per_win, dtype=torch.int32, device=device)
        ends = (index * side + (side + self.kv_per_win - 1)) // self.kv_per_win
        return torch.stack((index * side // self.kv_per_win, ends), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """See `KVDownsampling`."""
        if being_exported():
            return self._exportable(x)
        pool = F.adaptive_avg_pool2d if self.mode == MEAN else F.adaptive_max_pool2d
        return pool(x, self.kv_per_win)

    def _exportable(self, x: Tensor) -> Tensor:
        """Computes what `forward` computes, without adaptive pooling, which ONNX does not have."""
        height, width = x.shape[-2:]
        row_cells, column_cells = self.cells(height, width, x.device)
        if self.mode == MEAN:
            return mean_matrix(row_cells, height, x) @ x @ mean_matrix(column_cells, width, x).t()
        x, _ = window_maxima(x, 3, column_cells, self.largest(width))
        return window_maxima(x, 2, row_cells, self.largest(height))[0]

    def extra_repr(self) -> str:
        """Mode and cells per side."""
        return f"{self.mode}, kv_per_win={self.kv_per_win}"


class WindowPooling(FixedCells):
    """`"avgpool"`, `"maxpool"`: windows of `ratio` x `ratio` tokens side by side; a remainder is dropped."""

    def __init__(self, qk_dim: int, dim: int, mode: str, ratio: int) -> None:
        super().__init__(qk_dim, dim, mode)
        self.ratio = whole("kv_downsample_ratio", ratio)

    def count(self, side: int) -> int:
        """See `KVDownsampling`."""
        _check_fits("kv_downsample_ratio", self.ratio, side)
        return side // self.ratio

    @property
    def numbers(self) -> tuple[int, ...]:
        """The window."""
        return (self.ratio,)

    def largest(self, side: int) -> int:
        """See `KVDownsampling`."""
        return self.ratio

    def _along(self, side: int, device: torch.device) -> Tensor:
        starts = torch.arange(self.count(side), dtype=torch.int32, device=device) * self.ratio
        return torch.stack((starts, starts + self.ratio), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """See `KVDownsampling`."""
        _check_fits("kv_downsample_ratio", self.ratio, min(x.shape[-2:]))
        return F.avg_pool2d(x, self.ratio) if self.mode == MEAN else F.max_pool2d(x, self.ratio)

    def extra_repr(self) -> str:
        """Mode and window."""
        return f"{self.mode}, ratio={self.ratio}"


class FractionalMaxPooling(KVDownsampling):
    """`"fracpool"`: Graham, "Fractional Max-Pooling" (2014), with overlapping windows at random distances.

    Each call draws two random samples, one for each side, for keys and values of all regions and images; in
    eval both are 0.5.
    """

    def __init__(self, qk_dim: int, dim: int, ratio: float, kernel: int | None) -> None:
        super().__init__(qk_dim, dim, MAX)
        self.ratio = at_least_one("kv_downsample_ratio", ratio)
        # As a fraction of whole numbers, by which torch.compile can divide a symbolic side.
        self._ratio = Fraction(self.ratio).limit_denominator(1000)
        self.kernel = None if kernel is None else whole("kv_downsample_kernel", kernel)

    def count(self, side: int) -> int:
        """`max(1, floor(side / ratio))`."""
        return larger(1, side * self._ratio.denominator // self._ratio.numerator)

    def window(self, side: int) -> int:
        """Tokens of a cell along a side; raises ValueError if cells would coincide or leave a token out."""
        count = self.count(side)
        # Only positive numbers are divided: the division of an exported graph rounds negative ones up.
        smallest, largest = (side + count - 1) // count, side - count + 1
        if self.kernel is None:
            return smallest
        if not smallest <= self.kernel <= largest:
            raise ValueError(
                f"kv_downsample_kernel must be from {smallest} to {largest} so that {count} different cells "
                f"cover a region's side of {side} tokens (kv_downsample_ratio={self.ratio}), "
                f"got {self.kernel}"
            )
        return self.kernel

    def largest(self, side: int) -> int:
        """See `KVDownsampling`."""
        return self.window(side)

    def cells(self, height: int, width: int, device: torch.device) -> Cells:
        """See `KVDownsampling`."""
        if self.training:
            samples = torch.randint(SAMPLE_STEPS, (2,), device=device) / SAMPLE_STEPS
        else:
            samples = torch.full((2,), 0.5, device=device)
        return (
            fractional_cells(height, self.count(height), self.window(height), samples[0]),
            fractional_cells(width, self.count(width), self.window(width), samples[1]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See `KVDownsampling`."""
        # Not F.fractional_max_pool2d: it computes the cells in the dtype of x, and cannot be exported.
        row_cells, column_cells = self.cells(x.shape[-2], x.shape[-1], x.device)
        x, _ = window_maxima(x, 3, column_cells, self.window(x.shape[3]))
        return window_maxima(x, 2, row_cells, self.window(x.shape[2]))[0]

    def extra_repr(self) -> str:
        """Ratio and window."""
        return f"ratio={self.ratio}, kernel={self.kernel}"


class DepthwiseConvolution(FixedCells):
    """`"conv"`: depthwise convolutions of keys and of values, with stride `ratio`, inside each region."""

    def __init__(self, qk_dim: int, dim: int, ratio: int, kernel: int | None) -> None:
        super().__init__(qk_dim, dim, WEIGHTED)
        self.ratio = whole("kv_downsample_ratio", ratio)
        self.kernel = self.ratio if kernel is None else whole("kv_downsample_kernel", kernel)
        self.key, self.value = (
            nn.Conv2d(width, width, self.kernel, stride=self.ratio, groups=width)
            for width in (self.qk_dim, self.dim)
        )

    def count(self, side: int) -> int:
        """See `KVDownsampling`."""
        _check_fits("kv_downsample_kernel", self.kernel, side)
        return (side - self.kernel) // self.ratio + 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """Stride and kernel."""
        return (self.ratio, self.kernel)

    def largest(self, side: int) -> int:
        """See `KVDownsampling`."""
        return self.kernel

    def _along(self, side: int, device: torch.device) -> Tensor:
        starts = torch.arange(self.count(side), dtype=torch.int32, device=device) * self.ratio
        return torch.stack((starts, starts + self.kernel), dim=1)

    def packed_parameters(self) -> tuple[Tensor, Tensor]:
        """See `KVDownsampling`."""
        key, value = self.key, self.value
        assert key.bias is not None
        assert value.bias is not None
        return torch.cat((key.weight, value.weight)).squeeze(1), torch.cat((key.bias, value.bias))

    def forward(self, x: Tensor) -> Tensor:
        """See `KVDownsampling`."""
        _check_fits("kv_downsample_kernel", self.kernel, min(x.shape[-2:]))
        key, value = x.split([self.qk_dim, self.dim], dim=1)
        return torch.cat((self.key(key), self.value(value)), dim=1)


def may_be_bypassed(kv_down: Any) -> bool:
    """Whether a fused backend may compute the down-sampling without calling `kv_down` and its layers."""
    if not isinstance(kv_down, KVDownsampling) or not is_plain(kv_down, type(kv_down)):
        return False
    return not isinstance(kv_down, DepthwiseConvolution) or all(
        is_plain_window(layer, width, kv_down.kernel, kv_down.ratio)
        for layer, width in ((kv_down.key, kv_down.qk_dim), (kv_down.value, kv_down.dim))
    )


def _whole(ratio: float) -> int:
    ratio = at_least_one("kv_downsample_ratio", ratio)
    if ratio != int(ratio):
        raise ValueError(f"kv_downsample_ratio must be a whole number except for 'fracpool', got {ratio}")
    return int(ratio)


def _check_fits(name: str, value: int, side: int) -> None:
    if value > side:
        raise ValueError(f"{name} must be at most a region's side of {side} tokens, got {value}")
