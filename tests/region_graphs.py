"""Graphs of regions for tests of the lists: a problem with a graph, and a plain inverse of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import RoutedAttention
from bra_triton.kernels.routing import lists


def problem_of(
    r_idx: Tensor, query_grid: RegionGrid, kv_grid: RegionGrid, factor: Tensor | None = None
) -> RoutedAttention[Tensor]:
    """An attention with one channel a graph: the lists depend only on the graph and the grids."""
    batch, n_graphs = r_idx.shape[:2]
    query, kv = (
        torch.zeros(batch, g.height, g.width, n_graphs, device=r_idx.device) for g in (query_grid, kv_grid)
    )
    return RoutedAttention(query, kv, kv, r_idx, query_grid, kv_grid, n_graphs, 1.0, factor)


def pairs_by_region(graph: Tensor, n_regions: int, query_grid: RegionGrid | None = None) -> list[list[int]]:
    """The inverse of a graph `(P, topk)`: the pairs that chose each region.

    Pairs of query regions without a token in the map of `query_grid` are left out.
    """
    rows: list[list[int]] = [[] for _ in range(n_regions)]
    pair = 0
    for query_region, chosen in enumerate(graph.tolist()):
        for region in chosen:
            if query_grid is None or query_grid.token(query_region, 0) is not None:
                rows[region].append(pair)
            pair += 1
    return rows


@contextmanager
def by_way_of_coarser(fan_bits: int) -> Iterator[None]:
    """Context in which graphs of more than 2**fan_bits regions are inverted by way of coarser inverses."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_MOST_READ", 0), ("_MOST_SORTED", 0), ("_FAN_BITS", fan_bits)):
            patch.setattr(lists, name, value)
        yield
