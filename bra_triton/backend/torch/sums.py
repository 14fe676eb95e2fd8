"""Sums over all that chose a region, in an order that never changes."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.problem import statistic_dtype
from . import devices


class Bags(NamedTuple):
    """The choices of each key region's choosers, in one list: `torch.embedding_bag` sums over them.

    On NVIDIA and AMD that is one launch without atomics, which adds up in float32, one row after the other,
    reads each row once, where it lies, and rounds once.

    Attributes:
        choices: `(R*topk,)` int64: choices, counted row by row, in the order of what was chosen.
        starts: `(P,)` int64: where in `choices` those of each key region start.
    """

    choices: Tensor
    starts: Tensor

    @classmethod
    def of(cls, index: Tensor, regions: range) -> "Bags":
        """For chosen regions `index`, `(R*topk,)`, all of them in `regions`."""
        chosen, choices = index.sort(stable=True)
        bags = torch.arange(regions.start, regions.stop, dtype=chosen.dtype, device=chosen.device)
        return cls(choices, torch.searchsorted(chosen, bags))

    def sums(self, rows: Tensor, weight: Tensor | None, topk: int = 1) -> Tensor:
        """For each key region the sum of its choosers' rows: `(P, F)`, of the dtype of `rows`.

        Args:
            rows: `(R*topk, F)`; or, with `topk`, `(R, F)`: the same for all choices of a region.
            weight: `(R*topk,)`: a factor of each choice's row.
            topk: how many choices share a row.
        """
        indices = self.choices if topk == 1 else self.choices // topk
        weights = None if weight is None else weight.to(rows.dtype).index_select(0, self.choices)
        return bag_sums(rows, indices, self.starts, weights)


def bag_sums(rows: Tensor, indices: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of the rows that each bag names, times their weights; see `Bags`."""
    return torch.embedding_bag(rows, indices, starts, False, 0, False, weights)[0]


def has_bags(x: Tensor) -> bool:
    """Whether `Bags` are the fastest for tensors like `x`."""
    return devices.kind(x) in ("cuda", "hip")


@dataclass(frozen=True)
class Choices:
    """What the query regions of a chunk chose.

    Attributes:
        index: `(R*topk,)` int32: key regions, counted through all graphs and images; None where each query
            region stands for one graph of an image, and chose the one region that this has.
        factor: `(R*topk,)`: what the rows of a choice are multiplied by; None for nothing.
        reached: key regions of the chunk's graphs and images.
        is_complete: whether the chunk has all regions that chose one of `reached`.
    """

    index: Tensor | None
    factor: Tensor | None
    reached: range
    is_complete: bool

    @cached_property
    def _bags(self) -> Bags:
        assert self.index is not None
        return Bags.of(self.index, self.reached)

    def add(self, rows: Tensor, total: Tensor | None, n_regions: int) -> Tensor:
        """Adds what belongs to each choice to the total of the key region chosen.

        Args:
            rows: `(R*topk, F)`.
            total: `(n_regions, F)`, which is changed; None before the first chunk.
            n_regions: key regions of all graphs and images.

        Returns:
            The total. Half precision adds up to `P*topk` terms in it, and so does that in float32.
        """
        dtype = statistic_dtype(rows.dtype)
        if self.index is not None and not has_bags(rows):
            total = _zeros(rows, n_regions, dtype) if total is None else total
            rows = rows.to(dtype)
            rows = rows if self.factor is None else rows * self.factor[:, None].to(dtype)
            add_rows(total, self.index, rows)
            return total
        sums = rows if self.index is None else self._bags.sums(rows, self.factor)
        if self.is_complete and len(sums) == n_regions:
            return sums
        if total is None:
            total = _zeros(rows, n_regions, rows.dtype if self.is_complete else dtype)
        total[self.reached.start : self.reached.stop] += sums
        return total


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """`total[index] += rows` in a fixed order."""
    if devices.kind(total) == "cpu":
        total.index_add_(0, index, rows)
    else:
        # index_add_ uses atomics there; accumulating index_put_ sorts.
        total.index_put_((index.long(),), rows, accumulate=True)


def _zeros(rows: Tensor, n_regions: int, dtype: torch.dtype) -> Tensor:
    return rows.new_zeros(n_regions, rows.shape[1], dtype=dtype)
