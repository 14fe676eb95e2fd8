"""The functions that the operators call on a fused backend: their protocol, and the lookup by backend."""

from collections.abc import Sequence
from functools import cache
from typing import Protocol

from torch import Tensor

from ..kernels.grid import RegionGrid
from ..kernels.pooling.problem import PoolingGradients, RegionPooling
from ..kernels.problem import (
    Gradients,
    Needs,
    PackedAttention,
    PackedGradients,
    RoutedAttention,
)


class FusedKernels(Protocol):
    """The computations of a fused backend. A module that defines these functions implements the protocol.

    The functions do not check their arguments; their callers have done so. A function changes an argument
    only if its docstring says so. The same input always gives the same bits.
    """

    def attend(self, problem: PackedAttention[Tensor], trains: bool) -> tuple[Tensor, list[Tensor]]:
        """Routes, attends and adds LePE.

        Args:
            problem: what to compute.
            trains: whether a backward will follow.

        Returns:
            The output `(N, H, W, dim)`, contiguous, of the dtype of `qkv`; and the tensors that the backward
            reads, which each backend chooses for itself: an empty list if no backward follows.
        """

    def saved_like(self, problem: PackedAttention[Tensor]) -> list[Tensor]:
        """Tensors like those that `attend` returns for a backward, but uninitialised; for tracing."""

    def attend_backward(
        self,
        grad_out: Tensor,
        problem: PackedAttention[Tensor],
        out: Tensor | None,
        saved: Sequence[Tensor],
        needs: Needs,
    ) -> PackedGradients:
        """Gradients of the tensors of `problem`.

        Args:
            grad_out: contiguous `(N, H, W, dim)`, `N` at least 1.
            problem: the problem that `attend` got.
            out: the output that `attend` returned; None with LePE, where it is not needed.
            saved: the tensors that `attend` returned for the backward.
            needs: which gradients to return.
        """

    def attend_routed(self, problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
        """Attends to the regions that `problem` names; no routing, no LePE.

        Returns:
            `out` `(N, H, W, num_heads * v_head_dim)`, contiguous, of the maps' dtype; and the backend's
            softmax statistic `(N, num_heads, H, W)`, float32 or float64.
        """

    def attend_routed_backward(
        self, grad_out: Tensor, problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor
    ) -> Gradients[Tensor]:
        """Gradients of the maps, contiguous.

        Args:
            grad_out: contiguous, of the shape of `out`.
            problem: the problem that `attend_routed` got.
            out: what `attend_routed` returned.
            lse: what `attend_routed` returned.
        """

    def region_means(self, qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
        """Means over every region's tokens: `(N, P, channels)`, float32 or float64.

        Args:
            qkv: contiguous `(N, H, W, packed_dim)`.
            padding: `(packed_dim,)`, what tokens past the map's edge hold; None to leave them out.
            grid: the regions; without `padding`, each must contain a token of the map.
            channels: number of channels to average, counted from the first.
        """

    def route(self, query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
        """Chooses the `topk` key regions with the largest logits for every query region.

        Args:
            query: `(N, P, qk_dim)` region queries, float32 or float64; rows may be slices of wider rows.
            key: `(N, P, qk_dim)` region keys, with the dtype and the strides of `query`.
            topk: regions to choose.
            scale: factor of the logits.

        Returns:
            `r_weight`, the softmax over the chosen logits, of the dtype of `query`, and `r_idx` (int32), both
            `(N, P, topk)`; largest logit first, among equal logits the smaller region number first.
        """

    def route_backward(
        self,
        grad_weight: Tensor,
        r_weight: Tensor,
        r_idx: Tensor,
        query: Tensor,
        key: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `route`'s `query` and `key`, contiguous; `grad_weight` is that of `r_weight`."""

    def pool(
        self,
        x: Tensor,
        fill: Tensor | None,
        pooling: RegionPooling[Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Reduces the tokens of every region to cells.

        Args:
            x: `(N, H, W, C)` under `pooling.grid`: a channel slice of a contiguous map.
            fill: `(C,)`, contiguous: what tokens past the map's edge hold; needed where the grid is padded.
            pooling: the cells and how they are reduced.
            weight: `(C, kernel height, kernel width)`, for `WEIGHTED`.
            bias: `(C,)`, for `WEIGHTED`.

        Returns:
            The pooled map `(N, rows*h', columns*w', C)`, contiguous, of the dtype of `x`; and for `MAX` the
            number of the token, row-major inside its region, from which each element was taken, int32 of the
            same shape; otherwise None.
        """

    def pool_backward(
        self,
        grad_pooled: Tensor,
        x: Tensor,
        fill: Tensor | None,
        argmax: Tensor | None,
        pooling: RegionPooling[Tensor],
        weight: Tensor | None,
        grad_x: Tensor,
    ) -> PoolingGradients:
        """Gradients of the tensors that `pool` takes.

        Args:
            grad_pooled: `(N, rows*h', columns*w', C)`, contiguous.
            x: as for `pool`; its values are read only for `WEIGHTED`.
            fill: as for `pool`.
            argmax: the second result of `pool`.
            pooling: as for `pool`.
            weight: as for `pool`.
            grad_x: where to write the gradient of `x`, with the strides of `x`; every element is written
                once.
        """


@cache
def fused_kernels(backend: str) -> FusedKernels:
    """The functions of the backend "triton" or "torch"; imports Triton only for "triton"."""
    if backend == "triton":
        from ..kernels import calls

        return calls
    from . import torch as torch_kernels

    return torch_kernels
