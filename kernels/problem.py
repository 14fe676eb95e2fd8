"""The tensors and numbers of an attention, which every backend takes. Does not import Triton."""

from collections.abc import Hashable, Sequence
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
    """The numbers of a bi-level routing attention on maps of one size.

    Attributes:
        qk_dim: channels of the queries and of the keys, all heads together.
        num_heads: attention heads.
        grid: regions of the map.
        topk: regions that every region attends to.
        scale: factor of the tokens' logits.
        routing_scale: factor of the regions' logits.
        routing_weight: how the attention uses the routing weights. "none": not at all. "soft": as a factor of
            the chosen keys and values. "hard": the forward is that of "none", and the backward gives the
            routing weights the gradient that a factor of 1 would get.
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
        return self._hash  # called several times for each attention

    @property
    def region_logits(self) -> int:
        """Number of logits of the routing, for one image."""
        return self.grid.n_regions**2

    def token_scores(self, region_keys: int) -> int:
        """Number of scores of the attention, for one image and one head; a region has `region_keys` keys."""
        return self.grid.n_regions * self.grid.region_tokens * self.topk * region_keys

    @property
    def chooses_all(self) -> bool:
        """Whether every region attends to all regions, unweighted, so that the call needs no routing."""
        return self.routing_weight == "none" and self.topk == self.grid.n_regions


@dataclass(slots=True)  # not frozen: a frozen object takes three times as long to make
class PackedAttention(Generic[A]):
    """The problem that a fused backend computes: routing, attention and LePE of one packed projection.

    Attributes:
        qkv: `(N, H, W, 2*qk_dim + dim)`, contiguous: queries, keys and values side by side.
        kv: `(N, H', W', qk_dim + dim)`, contiguous: down-sampled keys and values; None to use those of `qkv`.
        padding: `(2*qk_dim + dim,)`, contiguous: the packed row that tokens past the map's edge hold; None if
            there are no such tokens.
        means: `(N, P, 2*qk_dim)`: region queries and keys, the output of the router's layer; None to use the
            means of `qkv`.
        lepe_weight: `(dim, 1, k, k)`, contiguous: depthwise convolution of the values; None without LePE.
        lepe_bias: `(dim,)`, contiguous; None without a bias.
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
        """The tensors, in the order of the attributes."""
        return self.qkv, self.kv, self.padding, self.means, self.lepe_weight, self.lepe_bias

    @classmethod
    def of(
        cls, tensors: Sequence[A | None], settings: Settings, plans: dict[Hashable, Any] | None = None
    ) -> "PackedAttention[A]":
        """The problem whose `tensors` these are."""
        qkv, kv, padding, means, lepe_weight, lepe_bias = tensors
        assert qkv is not None
        return cls(qkv, kv, padding, means, lepe_weight, lepe_bias, settings, plans)

    @property
    def dim(self) -> int:
        """Channels of the values."""
        return self.qkv.shape[-1] - 2 * self.settings.qk_dim

    @property
    def weighs(self) -> bool:
        """Whether the forward or the backward uses the routing weights."""
        return self.settings.routing_weight != "none"

    @property
    def routing_learns(self) -> bool:
        """Whether a backward continues through the routing weights."""
        return self.weighs and self.settings.diff_routing

    def routed(self, r_idx: A | None, r_weight: A | None = None) -> "RoutedAttention[A]":
        """The attention to regions that have been chosen.

        Args:
            r_idx: `(N, P, topk)` int32, contiguous; None if every region attends to all regions: then the
                whole map becomes one region.
            r_weight: `(N, P, topk)`, contiguous: the routing weights, which are a factor if routing is soft.
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
        graph = factor = None
        if r_idx is None:
            grid, kv_grid = grid.merged, kv_grid.merged
        else:
            batch, n_regions, topk = r_idx.shape
            graph = r_idx.view(batch, 1, n_regions, topk)
            if r_weight is not None and settings.routing_weight == "soft":
                factor = r_weight.view(batch, 1, n_regions, topk)
        return RoutedAttention(
            query,
            channels(key_value, 0, qk_dim),
            channels(key_value, qk_dim, qk_dim + self.dim),
            graph,
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
    """Which tensors of a `PackedAttention` need a gradient; the gradient of `qkv` is always computed."""

    qkv: bool = True
    kv: bool = False
    padding: bool = False
    means: bool = False
    lepe_weight: bool = False
    lepe_bias: bool = False


class PackedGradients(NamedTuple):
    """Gradients of the tensors of a `PackedAttention`, contiguous; None for those not asked for."""

    qkv: Tensor
    kv: Tensor | None = None
    padding: Tensor | None = None
    means: Tensor | None = None
    lepe_weight: Tensor | None = None
    lepe_bias: Tensor | None = None


@dataclass(frozen=True)
class Padding(Generic[A]):
    """The key and the value of every token past the map's edge; these tokens are in no map.

    Attributes:
        key: `(num_heads * qk_head_dim,)`, of the keys' dtype, contiguous.
        value: `(num_heads * v_head_dim,)`, of the values' dtype, contiguous.
    """

    key: A
    value: A


@dataclass(frozen=True)
class RoutedAttention(Generic[A]):
    """Attention from every query region to the tokens of the key regions it chose.

    Maps are NHWC and dense, except that their channels may be a slice, with stride 1, of a wider packed map.

    Attributes:
        query: `(N, H, W, num_heads * qk_head_dim)`.
        key: `(N, H_kv, W_kv, num_heads * qk_head_dim)`.
        value: `(N, H_kv, W_kv, num_heads * v_head_dim)`.
        r_idx: `(N, G, P, topk)` int32, contiguous: key regions that each query region chose. `G`, the graphs
            per image, is 1 (all heads share it) or `num_heads`. None if there is one region, which attends to
            itself.
        query_grid: regions of `query`.
        kv_grid: regions of `key` and `value`; may differ from those of `query` in number and size.
        num_heads: attention heads.
        scale: factor of the logits.
        factor: `(N, G, P, topk)` float32, contiguous, positive: factor of the keys and values of each chosen
            region; None for no factor.
        padding: what keys and values past the edge hold; None where `kv_grid` is not padded.
        distinct: True if no region chose the same region twice, as is always so after routing. If False, a
            region may have been chosen twice; it then counts twice.
        key_value: `key` and `value` side by side, if they are slices of one map; else None.
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
        """The maps and `r_idx`, in this order, then key and value of the padding."""
        key, value = (None, None) if self.padding is None else (self.padding.key, self.padding.value)
        return self.query, self.key, self.value, self.r_idx, key, value

    @property
    def batch(self) -> int:
        """Images, `N`."""
        return self.query.shape[0]

    @property
    def n_graphs(self) -> int:
        """Graphs per image, `G`."""
        return 1 if self.r_idx is None else self.r_idx.shape[1]

    @property
    def topk(self) -> int:
        """Number of key regions that every query region chose."""
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
    """Gradients of query, key and value, of the same shapes; a backward writes every element once.

    They are slices of one packed map, or separate maps.
    """

    query: A
    key: A
    value: A


@dataclass(frozen=True)
class Lepe(Generic[A]):
    """The depthwise convolution of the values that is added to the attention's output.

    Attributes:
        value: `(N, H, W, dim)`, NHWC, dense except for its channels, as in `RoutedAttention`.
        weight: `(dim, 1, k, k)`, `k` odd, of the values' dtype, contiguous.
        bias: `(dim,)`, of the values' dtype, contiguous; None without a bias.
        grid: regions of `value`. Padding tokens (past the map but inside a region) take part in the
            convolution; past the regions everything is 0.
        fill: `(dim,)`, of the values' dtype, contiguous: what padding tokens hold; None where `grid` is not
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
        """Height and width of the part of the padded map that the convolution of the map's tokens reads."""
        bottom, right = (min(added, self.kernel_size // 2) for added in self.grid.padding)
        return self.grid.height + bottom, self.grid.width + right
