"""What one routed attention is made of: the tensors and numbers that every backend takes. Needs no Triton."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from .arrays import A, channels
from .grid import RegionGrid


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of softmax statistics, region means and routing weights for maps of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Settings:
    """The numbers of one bi-level routing attention over one size of map.

    Attributes:
        qk_dim: channels of the queries and of the keys, all heads together.
        num_heads: attention heads.
        grid: regions of the map.
        topk: regions that every region attends to.
        scale: factor of the tokens' logits.
        routing_scale: factor of the regions' logits.
        routing_weight: how the routing weights enter: "none": not at all; "soft": as a factor of the chosen
            keys and values; "hard": with the forward of "none" and the gradient that such a factor of 1
            would get.
        diff_routing: whether the routing weights have a gradient.
        counts_padding: whether tokens past the map's edge take part in the regions' means, as they do in the
            attention.
    """

    qk_dim: int
    num_heads: int
    grid: RegionGrid
    topk: int
    scale: float
    routing_scale: float
    routing_weight: str = "none"
    diff_routing: bool = False
    counts_padding: bool = True

    @cached_property
    def _hash(self) -> int:
        return hash((self.qk_dim, self.num_heads, self.grid, self.topk, self.scale, self.routing_weight))

    def __hash__(self) -> int:
        return self._hash  # asked several times a call

    @property
    def region_pairs(self) -> int:
        """Logits of the routing, of one image."""
        return self.grid.n_regions**2

    def token_pairs(self, region_keys: int) -> int:
        """Scores of the attention, of one image and one head, where a region has `region_keys` keys."""
        return self.grid.n_regions * self.grid.region_tokens * self.topk * region_keys

    @property
    def chooses_all(self) -> bool:
        """Whether every region attends to all, so that nothing need be routed."""
        return self.routing_weight == "none" and self.topk == self.grid.n_regions


@dataclass(slots=True)  # not frozen, which would take three times as long to make
class PackedAttention(Generic[A]):
    """Routing, attention and LePE of one packed projection: what a fused backend computes.

    Attributes:
        qkv: `(N, H, W, 2*qk_dim + dim)`, contiguous: queries, keys and values side by side.
        kv: `(N, H', W', qk_dim + dim)`, contiguous: keys and values, down-sampled; None for those of `qkv`.
        padding: `(2*qk_dim + dim,)`, contiguous: what tokens past the map's edge hold; None where there are
            none.
        means: `(N, P, 2*qk_dim)`: region queries and keys that a layer of the router has made; None for the
            means of `qkv`.
        lepe_weight: `(dim, 1, k, k)`, contiguous: depthwise convolution of the values; None for none.
        lepe_bias: `(dim,)`, contiguous.
        settings: the numbers.
        plans: where the caller keeps the plans of problems like this one, with the same settings, shapes,
            dtype and device; None if it has no such place.
    """

    qkv: A
    kv: A | None
    padding: A | None
    means: A | None
    lepe_weight: A | None
    lepe_bias: A | None
    settings: Settings
    plans: dict[Hashable, Any] | None = None

    @property
    def tensors(self) -> tuple[A | None, ...]:
        """The tensors, in their order."""
        return self.qkv, self.kv, self.padding, self.means, self.lepe_weight, self.lepe_bias

    @property
    def dim(self) -> int:
        """Channels of the values."""
        return self.qkv.shape[-1] - 2 * self.settings.qk_dim

    @property
    def weighs(self) -> bool:
        """Whether the routing weights enter."""
        return self.settings.routing_weight != "none"

    @property
    def routing_learns(self) -> bool:
        """Whether a backward continues through the routing weights."""
        return self.weighs and self.settings.diff_routing

    def routed(self, r_idx: A | None, factor: A | None = None) -> "RoutedAttention[A]":
        """The attention that remains once regions are chosen.

        Args:
            r_idx: `(N, P, topk)` int32; None where every region attends to all, which leaves one region.
            factor: `(N, P, topk)`: the routing weights, where they are a factor.
        """
        settings, qk_dim = self.settings, self.settings.qk_dim
        grid = kv_grid = settings.grid
        query = channels(self.qkv, 0, qk_dim)
        padding = None
        if self.kv is None:
            key_value = channels(self.qkv, qk_dim, 2 * qk_dim + self.dim)
            if self.padding is not None:
                padding = Padding(
                    channels(self.padding, qk_dim, 2 * qk_dim),
                    channels(self.padding, 2 * qk_dim, 2 * qk_dim + self.dim),
                )
        else:
            key_value = self.kv
            cells = (self.kv.shape[1] // grid.rows, self.kv.shape[2] // grid.columns)
            kv_grid = grid.pooled(*cells)
        if r_idx is None:
            grid, kv_grid = grid.merged, kv_grid.merged
        return RoutedAttention(
            query,
            channels(key_value, 0, qk_dim),
            channels(key_value, qk_dim, qk_dim + self.dim),
            r_idx,
            grid,
            kv_grid,
            settings.num_heads,
            settings.scale,
            factor,
            padding,
            distinct=True,
            key_value=key_value,
        )

    def lepe(self) -> "Lepe[A] | None":
        """The convolution, if there is one."""
        if self.lepe_weight is None:
            return None
        first, last = 2 * self.settings.qk_dim, self.qkv.shape[-1]
        fill = None if self.padding is None else channels(self.padding, first, last)
        value = channels(self.qkv, first, last)
        return Lepe(value, self.lepe_weight, self.lepe_bias, self.settings.grid, fill)


class Needs(NamedTuple):
    """Which tensors of a `PackedAttention` need a gradient; that of `qkv` is computed in any case."""

    qkv: bool = True
    kv: bool = False
    padding: bool = False
    means: bool = False
    lepe_weight: bool = False
    lepe_bias: bool = False


class PackedGradients(NamedTuple):
    """Gradients of the tensors of a `PackedAttention`, contiguous; None where none was asked for."""

    qkv: Tensor
    kv: Tensor | None = None
    padding: Tensor | None = None
    means: Tensor | None = None
    lepe_weight: Tensor | None = None
    lepe_bias: Tensor | None = None


@dataclass(frozen=True)
class Padding(Generic[A]):
    """What tokens past the map's edge hold; they are never stored.

    Attributes:
        key: `(num_heads * qk_head_dim,)`, of the keys' dtype, contiguous.
        value: `(num_heads * v_head_dim,)`, of the values' dtype, contiguous.
    """

    key: A
    value: A


@dataclass(frozen=True)
class RoutedAttention(Generic[A]):
    """Attention from every query region to the tokens of the key regions it chose.

    Maps are NHWC, dense except for their channels: those may be a slice of a wider packed map, with stride 1.

    Attributes:
        query: `(N, H, W, num_heads * qk_head_dim)`.
        key: `(N, H_kv, W_kv, num_heads * qk_head_dim)`.
        value: `(N, H_kv, W_kv, num_heads * v_head_dim)`.
        r_idx: `(N, G, P, topk)` int32, contiguous: key regions that each query region chose. `G` graphs an
            image: 1 for all heads, or `num_heads`. None where there is one region, which attends to itself.
        query_grid: regions of `query`.
        kv_grid: regions of `key` and `value`; may differ from the queries' in number and size.
        num_heads: attention heads.
        scale: factor of the logits.
        factor: `(N, G, P, topk)` float32, contiguous: what keys and values of a chosen region are multiplied
            by; None for nothing. Positive.
        padding: what keys and values past the edge hold; None where `kv_grid` is not padded.
        distinct: no region chose another one twice, as routing never does. Otherwise that one counts twice.
        key_value: `key` and `value` side by side, where they are slices of one map; else None.
    """

    query: A
    key: A
    value: A
    r_idx: A | None
    query_grid: RegionGrid
    kv_grid: RegionGrid
    num_heads: int
    scale: float
    factor: A | None = None
    padding: Padding[A] | None = None
    distinct: bool = False
    key_value: A | None = None

    @property
    def tensors(self) -> tuple[A | None, ...]:
        """The arrays, in their order, those of the padding last."""
        key, value = (None, None) if self.padding is None else (self.padding.key, self.padding.value)
        return self.query, self.key, self.value, self.r_idx, key, value

    @property
    def batch(self) -> int:
        """Images, `N`."""
        return self.query.shape[0]

    @property
    def n_graphs(self) -> int:
        """Graphs an image, `G`."""
        return 1 if self.r_idx is None else self.r_idx.shape[1]

    @property
    def topk(self) -> int:
        """Key regions that every query region chose."""
        return 1 if self.r_idx is None else self.r_idx.shape[-1]

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query or key in one head."""
        return self.query.shape[-1] // self.num_heads

    @property
    def v_head_dim(self) -> int:
        """Channels of a value in one head."""
        return self.value.shape[-1] // self.num_heads


@dataclass(frozen=True)
class Gradients(Generic[A]):
    """Where a backward writes: maps of the shapes of query, key and value, every element written once.

    Slices of one packed map, or maps of their own.
    """

    query: A
    key: A
    value: A


@dataclass(frozen=True)
class SmallGradients(Generic[A]):
    """What a backward returns besides the maps.

    Attributes:
        factor: `(N, G, P, topk)` float32: gradient of `factor`, or, without a factor, what it would be at 1.
            None unless asked for.
        padding: gradients of `padding`, float32; None without it.
    """

    factor: A | None
    padding: Padding[A] | None


@dataclass(frozen=True)
class Lepe(Generic[A]):
    """The depthwise convolution of the values that is added to the attention's output.

    Attributes:
        value: `(N, H, W, dim)`, NHWC, dense except for its channels, as in `RoutedAttention`.
        weight: `(dim, 1, k, k)`, `k` odd, of the values' dtype, contiguous.
        bias: `(dim,)`, of the values' dtype, contiguous; None for none.
        grid: regions of `value`. Tokens past the map but within its regions take part in the convolution;
            past the regions everything is 0.
        fill: `(dim,)`, of the values' dtype, contiguous: what such tokens hold; None where `grid` is not
            padded.
    """

    value: A
    weight: A
    bias: A | None
    grid: RegionGrid
    fill: A | None = None

    def __post_init__(self) -> None:
        dim, kernel = self.value.shape[-1], self.weight.shape[-1]
        assert self.weight.shape == (dim, 1, kernel, kernel)
        assert kernel % 2 == 1
        assert (self.fill is not None) == self.grid.is_padded

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
class LepeGradients(Generic[A]):
    """What the backward of LePE returns besides the values' gradient; float32, or float64 where the map is.

    Attributes:
        weight: `(dim, 1, k, k)`; None unless asked for.
        bias: `(dim,)`; None unless asked for, and without a bias.
        fill: `(dim,)`; None without a fill.
    """

    weight: A | None
    bias: A | None
    fill: A | None
