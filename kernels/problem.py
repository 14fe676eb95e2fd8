"""What one routed attention is made of: the tensors and numbers that every backend takes. Needs no Triton."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from .grid import RegionGrid


class Padding(NamedTuple):
    """What tokens past the map's edge hold; they are never stored. The kernels take it as it is.

    Attributes:
        key: `(num_heads * qk_head_dim,)`, of the keys' dtype, contiguous.
        value: `(num_heads * v_head_dim,)`, of the values' dtype, contiguous.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class RoutedAttention:
    """Attention from every query region to the tokens of the key regions it chose.

    Maps are NHWC, dense but for their channels: those may be a slice of a wider packed map, with stride 1.

    Attributes:
        query: `(N, H, W, num_heads * qk_head_dim)`.
        key: `(N, H_kv, W_kv, num_heads * qk_head_dim)`.
        value: `(N, H_kv, W_kv, num_heads * v_head_dim)`.
        r_idx: `(N, G, P, topk)` int32, contiguous: key regions that each query region chose. `G` graphs an
            image: 1 for all heads, or `num_heads`.
        query_grid: regions of `query`.
        kv_grid: regions of `key` and `value`; may differ from the queries' in number and size.
        num_heads: attention heads.
        scale: factor of the logits.
        factor: `(N, G, P, topk)` float32, contiguous: what keys and values of a chosen region are multiplied
            by; None for nothing. Positive.
        padding: what keys and values past the edge hold; None where `kv_grid` is not padded.
        distinct: no region chose another one twice, as routing never does. Otherwise that one counts twice.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    r_idx: Tensor
    query_grid: RegionGrid
    kv_grid: RegionGrid
    num_heads: int
    scale: float
    factor: Tensor | None = None
    padding: Padding | None = None
    distinct: bool = False

    @property
    def chooses_all(self) -> bool:
        """Whether every region chose all: then regions make no difference."""
        return self.distinct and self.topk == self.kv_grid.n_regions

    def merged(self) -> "RoutedAttention":
        """The same attention with one region, where every region `chooses_all` and there is no factor.

        BiFormer's last stage is such, with regions of one token, each a tile of its own otherwise.
        """
        assert self.chooses_all
        assert self.factor is None
        one = self.r_idx.new_zeros(*self.r_idx.shape[:2], 1, 1)
        return replace(self, query_grid=self.query_grid.merged, kv_grid=self.kv_grid.merged, r_idx=one)

    @property
    def batch(self) -> int:
        """Images, `N`."""
        return self.query.shape[0]

    @property
    def n_graphs(self) -> int:
        """Graphs an image, `G`."""
        return self.r_idx.shape[1]

    @property
    def topk(self) -> int:
        """Key regions that every query region chose."""
        return self.r_idx.shape[-1]

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query or key in one head."""
        return self.query.shape[-1] // self.num_heads

    @property
    def v_head_dim(self) -> int:
        """Channels of a value in one head."""
        return self.value.shape[-1] // self.num_heads


@dataclass(frozen=True)
class Gradients:
    """Where a backward writes: maps of the shapes of query, key and value, every element written once.

    Slices of one packed map, or maps of their own.
    """

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class SmallGradients:
    """What a backward returns besides the maps.

    Attributes:
        factor: `(N, G, P, topk)` float32: gradient of `factor`, or, without a factor, what it would be at 1.
            None unless asked for.
        padding: gradients of `padding`, float32; None without it.
    """

    factor: Tensor | None
    padding: Padding | None


@dataclass(frozen=True)
class Lepe:
    """The depthwise convolution of the values that is added to the attention's output.

    Attributes:
        value: `(N, H, W, dim)`, NHWC, dense but for its channels, as in `RoutedAttention`.
        weight: `(dim, 1, k, k)`, `k` odd, of the values' dtype, contiguous.
        bias: `(dim,)`, of the values' dtype, contiguous; None for none.
        grid: regions of `value`. Tokens past the map but within its regions take part in the convolution;
            past the regions everything is 0.
        fill: `(dim,)`, of the values' dtype, contiguous: what such tokens hold; None where `grid` is not
            padded.

    Raises:
        ValueError: if the weight is no depthwise convolution of the values of an odd side, or `fill` is
            missing or has nothing to fill; names them.
    """

    value: Tensor
    weight: Tensor
    bias: Tensor | None
    grid: RegionGrid
    fill: Tensor | None = None

    def __post_init__(self) -> None:
        dim, kernel = self.value.shape[-1], self.weight.shape[-1]
        if self.weight.shape != (dim, 1, kernel, kernel) or kernel % 2 == 0:
            raise ValueError(f"weight must be ({dim}, 1, k, k) with odd k, got {tuple(self.weight.shape)}")
        if (self.fill is not None) != self.grid.is_padded:
            given = "no fill" if self.fill is None else "a fill"
            raise ValueError(
                f"fill must be given where the grid is padded and only there, got {given} and padding "
                f"{self.grid.padding}"
            )

    @property
    def kernel_size(self) -> int:
        """Side of the convolution, `k`."""
        return self.weight.shape[-1]

    @property
    def reach(self) -> tuple[int, int]:
        """Rows and columns, from the first, of the tokens that the convolution sees from some token."""
        bottom, right = (min(added, self.kernel_size // 2) for added in self.grid.padding)
        return self.grid.height + bottom, self.grid.width + right


@dataclass(frozen=True)
class LepeGradients:
    """What the backward of LePE returns besides the values' gradient; float32, or float64 where the map is.

    Attributes:
        weight: `(dim, 1, k, k)`; None unless asked for.
        bias: `(dim,)`; None unless asked for, and without a bias.
        fill: `(dim,)`; None without a fill.
    """

    weight: Tensor | None
    bias: Tensor | None
    fill: Tensor | None
