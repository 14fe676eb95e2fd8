"""The numbers that define one bi-level routing attention, checked once, when the object is made."""

from dataclasses import dataclass

from .arguments import factor, flag, whole, windows
from .kernels.grid import RegionGrid, smaller
from .kernels.problem import Settings


@dataclass(frozen=True)
class AttentionSpec:
    """What the attention computes, apart from the map's size.

    Attributes:
        dim: channels of the values and of the output.
        qk_dim: channels of the queries and of the keys, all heads together.
        num_heads: attention heads; divides `dim` and `qk_dim`.
        n_win: number of regions along each side, or `(rows, columns)`.
        topk: number of regions that every region attends to, from 1 to the number of regions.
        qk_scale: factor of the logits; if it is None, `qk_dim ** -0.5`. The fused backends copy the
            projection if the factor is negative.
        soft_routing: multiply the chosen keys and values by the routing weights.
        diff_routing: let gradients reach the regions' queries and keys through the routing weights. Without
            `soft_routing` the forward does not use the weights, and their gradient is straight-through.
        router_scale: factor of the regions' logits; if it is None, `scale`.
        counts_padding: whether tokens past the map's edge take part in the regions' means.

    Numbers may be NumPy's; the attributes are Python's.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        TypeError: for a scale that is a tensor, which would get no gradient.
    """

    dim: int
    qk_dim: int
    num_heads: int
    n_win: int | tuple[int, int]
    topk: int
    qk_scale: float | None = None
    soft_routing: bool = False
    diff_routing: bool = False
    router_scale: float | None = None
    counts_padding: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "qk_dim", "num_heads", "topk"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        object.__setattr__(self, "n_win", windows("n_win", self.n_win))
        for name in ("soft_routing", "diff_routing", "counts_padding"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name in ("qk_scale", "router_scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, factor(name, getattr(self, name)))
        for name in ("dim", "qk_dim"):
            if getattr(self, name) % self.num_heads:
                raise ValueError(
                    f"{name} must be a multiple of num_heads={self.num_heads}, got {getattr(self, name)}"
                )
        rows, columns = self.windows
        if self.topk > rows * columns:
            raise ValueError(
                f"topk must be at most the number of regions, {rows * columns} for n_win={self.n_win}, "
                f"got {self.topk}"
            )

    @property
    def windows(self) -> tuple[int, int]:
        """Regions along the height and along the width of the map."""
        return self.n_win if isinstance(self.n_win, tuple) else (self.n_win, self.n_win)

    @property
    def scale(self) -> float:
        """Factor of the tokens' logits, and of the regions' logits unless `router_scale` is given."""
        return self.qk_dim**-0.5 if self.qk_scale is None else self.qk_scale

    @property
    def routing_scale(self) -> float:
        """Factor of the regions' logits."""
        return self.scale if self.router_scale is None else self.router_scale

    @property
    def routing_weight(self) -> str:
        """How the routing weights are used: "none", "soft" or "hard" (straight-through)."""
        return "soft" if self.soft_routing else "hard" if self.diff_routing else "none"

    @property
    def head_dims(self) -> tuple[int, int]:
        """Channels of a query or key, and of a value, in one head."""
        return self.qk_dim // self.num_heads, self.dim // self.num_heads

    @property
    def packed_dim(self) -> int:
        """Channels of the packed projection: queries, keys, values."""
        return 2 * self.qk_dim + self.dim

    def settings(self, grid: RegionGrid) -> Settings:
        """The numbers that backends take, for a map under `grid`."""
        return Settings(
            self.qk_dim,
            self.num_heads,
            grid,
            # `nchwBRA` cuts a map with fewer than n_win tokens a side into fewer regions, and may have fewer
            # than topk.
            smaller(self.topk, grid.n_regions),
            self.scale,
            self.routing_scale,
            self.routing_weight,
            self.diff_routing,
            self.counts_padding,
        )
