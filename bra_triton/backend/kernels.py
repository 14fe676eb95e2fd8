"""The functions behind the operators of a fused backend: what they do, and where they are."""

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
    """The computations of a fused backend; a module with these functions is one.

    They trust their callers: arguments are checked. None changes an argument, except where it says so; all
    give the same bits for the same input.
    """

    def attend(self, problem: PackedAttention[Tensor], trains: bool) -> tuple[Tensor, list[Tensor]]:
        """Routes, attends and adds LePE.

        Args:
            problem: what to compute.
            trains: whether a backward will follow.

        Returns:
            The output `(N, H, W, dim)` of the dtype of `qkv`, contiguous; and what the backward reads, in a
            form of the backend's own: nothing if none follows.
        """

    def saved_like(self, problem: PackedAttention[Tensor]) -> list[Tensor]:
        """Tensors as `attend` returns them for a backward, without their values: for tracing."""

    def attend_backward(
        self,
        grad_out: Tensor,
        problem: PackedAttention[Tensor],
        out: Tensor | None,
        saved: Sequence[Tensor],
        needs: Needs,
    ) -> PackedGradients:
        """Gradients of `attend`'s tensors.

        Args:
            grad_out: contiguous `(N, H, W, dim)`, `N` at least 1.
            problem: the forward's.
            out: the forward's output; None with LePE, where it is not needed.
            saved: the forward's.
            needs: which gradients to return.
        """

    def attend_routed(self, problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
        """Attends to regions that are given.

        Returns:
            `out` `(N, H, W, num_heads * v_head_dim)`, contiguous, of the maps' dtype; and the backend's
            softmax statistic `(N, num_heads, H, W)`, float32 or float64.
        """

    def attend_routed_backward(
        self, grad_out: Tensor, problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor
    ) -> Gradients[Tensor]:
        """Gradients of the maps, contiguous; `grad_out` is contiguous, `out` and `lse` the forward's."""

    def region_means(self, qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
        """Means over every region's tokens: `(N, P, channels)`, float32 or float64.

        Args:
            qkv: contiguous `(N, H, W, packed_dim)`.
            padding: `(packed_dim,)`, what tokens past the map's edge hold; None to leave them out.
            grid: the regions; without `padding` each has a token of the map.
            channels: how many of the first channels to take.
        """

    def route(self, query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
        """Chooses the `topk` key regions of the largest logits for every query region.

        Args:
            query: `(N, P, qk_dim)` region queries, float32 or float64; rows may be slices of wider ones.
            key: region keys, strided alike.
            topk: regions to choose.
            scale: factor of the logits.

        Returns:
            `r_weight`, the softmax over the chosen logits, of the dtype of `query`, and `r_idx` (int32), both
            `(N, P, topk)`; equal logits by the smaller index first.
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
        """Gradients of `route`'s query and key, contiguous, for the gradient of `r_weight`."""

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
            token of its region that each element is, row-major, int32 of that shape, else None.
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
        """Gradients of `pool`.

        Args:
            grad_pooled: `(N, rows*h', columns*w', C)`, contiguous.
            x: the forward's; its values are read for `WEIGHTED` alone.
            fill: the forward's.
            argmax: the forward's.
            pooling: the forward's.
            weight: the forward's.
            grad_x: where to write the gradient of `x`, with the strides of `x`; every element is written
                once.
        """


@cache
def fused_kernels(backend: str) -> FusedKernels:
    """The functions of the backend "triton" or "torch"; imports Triton for the former."""
    if backend == "triton":
        from ..kernels import calls

        return calls
    from . import torch as torch_kernels

    return torch_kernels
