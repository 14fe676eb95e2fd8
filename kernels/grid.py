"""The arithmetic of regions: how a feature map is cut into regions. Kernels use `lib.addressing` for it.

Regions are numbered row by row, and so are the tokens inside a region. The regions together may reach past
the map's bottom and right edge; tokens there are padding: they belong to regions but not to the map.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lib.integers import cdiv


@dataclass(frozen=True)
class RegionGrid:
    """A map of `height` x `width` tokens, and the `rows` x `columns` regions that cover it.

    Attributes:
        height: tokens in a column of the map.
        width: tokens in a row of the map.
        region_height: tokens in a column of a region, `h`.
        region_width: tokens in a row of a region, `w`.
        rows: regions in a column of the grid.
        columns: regions in a row of the grid.

    Raises:
        ValueError: if a number is below 1 or the regions do not cover the map; names them.
    """

    height: int
    width: int
    region_height: int
    region_width: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if any(map(is_symbol, self.numbers)):
            return
        for name, side, region_side, count in (
            ("height", self.height, self.region_height, self.rows),
            ("width", self.width, self.region_width, self.columns),
        ):
            # Not `min` of all three: it would compare them with each other, and a compiler would add a guard
            # for every result.
            if side < 1 or region_side < 1 or count < 1:
                raise ValueError(
                    f"the map's {name}, the region size and the number of regions must be at least 1, got "
                    f"{side}, {region_side} and {count}"
                )
            if count * region_side < side:
                raise ValueError(f"{count} regions of {region_side} do not cover a {name} of {side}")

    @classmethod
    def of_windows(
        cls, height: int, width: int, n_win: int | tuple[int, int], auto_pad: bool = True
    ) -> "RegionGrid":
        """The grid of BRA: `n_win` regions along each side of the map, which may need padding.

        Args:
            height: tokens in a column of the map.
            width: tokens in a row of the map.
            n_win: number of regions along each side, or two numbers, `(rows, columns)`.
            auto_pad: whether to accept a side of the map that is not a multiple of its number of regions;
                some regions then contain padding.

        Raises:
            ValueError: if `n_win` or the map is not allowed; names the argument, its value and what is
                allowed.
        """
        rows, columns = n_win if isinstance(n_win, tuple) else (n_win, n_win)
        if rows < 1 or columns < 1:
            raise ValueError(f"n_win must be at least 1, got {n_win}")
        least = (1, 1) if auto_pad else (rows, columns)
        if height < least[0] or width < least[1]:
            raise ValueError(
                f"the map must be at least {least[0]} x {least[1]} tokens with n_win={n_win} and "
                f"auto_pad={auto_pad}, got {height} x {width}"
            )
        if not auto_pad and (height % rows or width % columns):
            raise ValueError(
                f"the map's height and width must be multiples of n_win={n_win}, got "
                f"{height} x {width}; the modules pad it with auto_pad=True"
            )
        return cls(height, width, cdiv(height, rows), cdiv(width, columns), rows, columns)

    @classmethod
    def of_nchw(
        cls, height: int, width: int, windows: tuple[int, int], auto_pad: bool = True
    ) -> "RegionGrid":
        """The grid of the NCHW form: as many regions of `H // n_win` by `W // n_win` tokens as cover the map.

        Args:
            height: tokens in a column of the map.
            width: tokens in a row of the map.
            windows: the two numbers of `n_win`, `(rows, columns)`.
            auto_pad: whether to accept a map with fewer tokens along a side than `windows` says.

        Raises:
            ValueError: if the map is too small; says what is allowed.
        """
        if not auto_pad and (height < windows[0] or width < windows[1]):
            raise ValueError(
                f"the map must be at least {windows[0]} x {windows[1]} tokens (n_win), got "
                f"{height} x {width}; auto_pad=True accepts smaller maps"
            )
        region_height, region_width = larger(height // windows[0], 1), larger(width // windows[1], 1)
        # Every side has at least `smaller(...)` regions, so this `larger` changes no number. It is here to
        # tell torch.export that a side has more than one region.
        rows = larger(cdiv(height, region_height), smaller(height, windows[0]))
        columns = larger(cdiv(width, region_width), smaller(width, windows[1]))
        return cls(height, width, region_height, region_width, rows, columns)

    @classmethod
    def of_region_size(cls, height: int, width: int, region_size: tuple[int, int]) -> "RegionGrid":
        """The fewest regions that cover the map; `region_size` is their height and width in tokens."""
        region_height, region_width = region_size
        if region_height < 1 or region_width < 1:
            raise ValueError(f"region_size must be at least (1, 1), got {tuple(region_size)}")
        rows, columns = cdiv(height, region_height), cdiv(width, region_width)
        return cls(height, width, region_height, region_width, rows, columns)

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """The attributes in their order; operators take these numbers, because they cannot take objects."""
        return self.height, self.width, self.region_height, self.region_width, self.rows, self.columns

    @property
    def geometry(self) -> tuple[int, int, int, int, int]:
        """Numbers that locate a region's tokens: region height and width, columns, map height and width."""
        return self.region_height, self.region_width, self.columns, self.height, self.width

    @property
    def n_regions(self) -> int:
        """Regions in the map, `P`."""
        return self.rows * self.columns

    @property
    def region_tokens(self) -> int:
        """Tokens in a region, padding included, `S = h * w`."""
        return self.region_height * self.region_width

    @property
    def padding(self) -> tuple[int, int]:
        """Rows at the bottom and columns at the right by which the regions reach past the map."""
        return (
            self.rows * self.region_height - self.height,
            self.columns * self.region_width - self.width,
        )

    @property
    def share_of_padding(self) -> float:
        """Share of padding among the tokens of all regions."""
        return 1 - self.height * self.width / (self.n_regions * self.region_tokens)

    @property
    def is_padded(self) -> bool:
        """Whether some regions reach past the map; also True where symbols as sizes leave that unknown."""
        bottom, right = self.padding
        return not (is_sure(bottom == 0) and is_sure(right == 0))

    @property
    def merged(self) -> "RegionGrid":
        """The same tokens, padding included, as one region."""
        region_size = (self.rows * self.region_height, self.columns * self.region_width)
        return RegionGrid(self.height, self.width, *region_size, 1, 1)

    def pooled(self, cells_high: int, cells_wide: int) -> "RegionGrid":
        """The same regions with `cells_high` x `cells_wide` tokens in each, and no padding."""
        rows, columns = self.rows, self.columns
        return RegionGrid(rows * cells_high, columns * cells_wide, cells_high, cells_wide, rows, columns)

    def token(self, region: int, index: int) -> int | None:
        """Row-major position in the map of token `index` of `region`; None for padding."""
        row = region // self.columns * self.region_height + index // self.region_width
        column = region % self.columns * self.region_width + index % self.region_width
        return row * self.width + column if row < self.height and column < self.width else None


def is_symbol(size: Any) -> bool:
    """Whether a size is a symbol, which stands for many sizes in a graph that is being exported.

    In a trace (`torch.jit.trace`) symbols are tensors. Code may compute with a symbol but must not compare
    it: otherwise the graph would serve only sizes for which the comparison has the same result.
    """
    return isinstance(size, (torch.SymInt, Tensor))  # PyTorch 2.8 cannot compile `torch.SymInt | Tensor`


def is_sure(condition: Any) -> bool:
    """Whether a condition on sizes is true for all sizes that the symbols in it can stand for.

    The question adds no guard to a graph. Under `torch.compile` symbols look like ints, so only PyTorch's own
    `statically_known_true` can answer it.
    """
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a second to import

        return statically_known_true(condition)
    return condition is True


def larger(a: Any, b: Any) -> Any:
    """`max(a, b)`, also of symbols."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a + (b - a) * (b > a)  # ONNX's opset 11 has no maximum of integers
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)  # PyTorch 2.8 cannot compile `torch.sym_max` of numbers
    return torch.sym_max(a, b)


def smaller(a: Any, b: Any) -> Any:
    """`min(a, b)`, also of symbols."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a + (b - a) * (b < a)
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return torch.sym_min(a, b)
