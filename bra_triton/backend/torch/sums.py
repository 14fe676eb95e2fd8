"""Sums, for each key region, over the choices of that region, in an order that never changes."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.problem import statistic_dtype
from . import devices


class Bags(NamedTuple):
    """All choices in one list, sorted by the key region chosen, over which `torch.embedding_bag` sums.

    On NVIDIA and AMD GPUs `torch.embedding_bag` is one launch without atomics. It reads each row once, in
    place, adds the rows one after the other in float32, and rounds the sum once.

    Attributes:
        choices: `(R*topk,)` int64: numbers of choices (`query_region * topk + slot`), sorted by the key
            region chosen.
        starts: `(P,)` int64: where in `choices` the choices of each key region start.
    """

    choices: Tensor
    starts: Tensor

    @classmethod
    def of(cls, index: Tensor, regions: range) -> "Bags":
        """A bag for each region of `regions`; `index` `(R*topk,)` has each choice's region, one of these."""
        chosen, choices = index.sort(stable=True)
        bags = torch.arange(regions.start, regions.stop, dtype=chosen.dtype, device=chosen.device)
        return cls(choices, torch.searchsorted(chosen, bags))

    def sums(self, rows: Tensor, weight: Tensor | None, topk: int = 1) -> Tensor:
        """For each key region, the sum of the rows of its choices: `(P, F)`, of the dtype of `rows`.

        Args:
            rows: `(R*topk, F)`, a row for each choice; or, with `topk`, `(R, F)`, a row that all choices of a
                query region share.
            weight: `(R*topk,)`: a factor for the row of each choice.
            topk: number of choices that share a row.
        """
        indices = self.choices if topk == 1 else self.choices // topk
        weights = None if weight is None else weight.to(rows.dtype).index_select(0, self.choices)
        return bag_sums(rows, indices, self.starts, weights)


def bag_sums(rows: Tensor, indices: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """For each bag, the sum of the rows that it names, times their weights; see `Bags`."""
    return torch.embedding_bag(rows, indices, starts, False, 0, False, weights)[0]


def has_bags(x: Tensor) -> bool:
    """Whether `Bags` are the fastest way to sum tensors like `x`."""
    return devices.kind(x) in ("cuda", "hip")


@dataclass(frozen=True)
class Choices:
    """The choices of the query regions of a chunk.

    Attributes:
        index: `(R*topk,)` int32: the chosen key regions, numbered through all images and graphs; None if
            every graph has only one region, which chose itself.
        factor: `(R*topk,)`: factor for the row of each choice; None if there is none.
        reached: numbers of all key regions of the chunk's images and graphs.
        is_complete: whether the chunk has all query regions that chose one of `reached`.
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
        """Adds the row of each choice, times its factor, to the total of the key region chosen.

        Args:
            rows: `(R*topk, F)`.
            total: `(n_regions, F)`, which is changed; None before the first chunk.
            n_regions: number of key regions of all images and graphs.

        Returns:
            The total. A region may have up to `P*topk` terms, so half precision is added up in float32. The
            total has the dtype of `rows` only if all terms of a region are added up at once.
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
        # On other devices index_add_ uses atomics; an accumulating index_put_ sorts the indices instead.
        total.index_put_((index.long(),), rows, accumulate=True)


def _zeros(rows: Tensor, n_regions: int, dtype: torch.dtype) -> Tensor:
    return rows.new_zeros(n_regions, rows.shape[1], dtype=dtype)
