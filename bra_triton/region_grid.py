"""The arithmetic of regions: how a feature map is cut into `n_win` x `n_win` regions.

The one place that knows it. A map of `height` x `width` tokens is cut into `P = n_win**2` regions of
`region_height` x `region_width` tokens; regions and the tokens inside a region are both counted row by row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RegionGrid:
    """A map whose sides are multiples of `n_win`, cut into `n_win` x `n_win` regions.

    Attributes:
        height: tokens in a column of the map, a multiple of `n_win`.
        width: tokens in a row of the map, a multiple of `n_win`.
        n_win: regions a side.
    """

    height: int
    width: int
    n_win: int

    def __post_init__(self) -> None:
        if self.n_win < 1:
            raise ValueError(f"n_win must be at least 1, got {self.n_win}")
        if self.height % self.n_win or self.width % self.n_win:
            raise ValueError(
                f"the map's height and width must be multiples of n_win={self.n_win}, got "
                f"{self.height} x {self.width}; the modules pad it with auto_pad=True"
            )
        if self.height < self.n_win or self.width < self.n_win:
            raise ValueError(
                f"every one of the {self.n_win} x {self.n_win} regions (n_win={self.n_win}) needs a token, "
                f"got a map of {self.height} x {self.width}"
            )

    @property
    def n_regions(self) -> int:
        """Regions in the map, `P`."""
        return self.n_win * self.n_win

    @property
    def region_height(self) -> int:
        """Tokens in a column of a region, `h`."""
        return self.height // self.n_win

    @property
    def region_width(self) -> int:
        """Tokens in a row of a region, `w`."""
        return self.width // self.n_win

    @property
    def region_tokens(self) -> int:
        """Tokens in a region, `S = h * w`."""
        return self.region_height * self.region_width

    def token(self, region: int, index: int) -> int:
        """Row-major position in the map of token `index` of `region`."""
        row = region // self.n_win * self.region_height + index // self.region_width
        column = region % self.n_win * self.region_width + index % self.region_width
        return row * self.width + column


def padding_to_multiple(height: int, width: int, n_win: int) -> tuple[int, int]:
    """Rows at the bottom and columns at the right that make both sides multiples of `n_win`."""
    return -height % n_win, -width % n_win
