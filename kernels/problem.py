"""What one routed attention is made of: the tensors and numbers that every backend takes. Needs no Triton."""

from dataclasses import dataclass

from torch import Tensor

from .region_grid import RegionGrid


@dataclass(frozen=True)
class Padding:
    """What tokens past the map's edge hold; they are never stored.

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
