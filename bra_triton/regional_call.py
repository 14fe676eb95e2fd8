"""The call of an attention along a graph of regions that is given, and its checks."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .arguments import dense_floats, factor, flag, whole_pair
from .export import is_eager
from .kernels.grid import RegionGrid

# If this environment variable is 1, the values of region graphs are checked on a GPU, too, by waiting for it.
CHECK = "BRA_TRITON_CHECK"


@dataclass(slots=True)
class RegionalCall:
    """Attention to the regions that a given graph names, a graph per head; backends receive this object.

    Attributes:
        query: `(N, C, H, W)`.
        key: `(N, C, H_kv, W_kv)`; the map may differ from the queries' in size and number of regions.
        value: `(N, C_v, H_kv, W_kv)`.
        scale: factor of the logits.
        region_graph: `(N, G, P, topk)`, int64 or int32: key regions that every query region attends to, in
            `[0, P_kv)`; `G` is `num_heads`, or 1 if all heads share a graph. A region named twice counts
            twice.
        query_grid: regions of `query`.
        kv_grid: regions of `key` and `value`; padded keys take part, with logit 0 and value 0.
        num_heads: attention heads; divides `C` and `C_v`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    region_graph: Tensor
    query_grid: RegionGrid
    kv_grid: RegionGrid
    num_heads: int
    routes: ClassVar[bool] = False  # see `Request`
    calls: ClassVar[str] = ""  # likewise

    @property
    def like(self) -> Tensor:
        """See `Request`."""
        return self.query

    @property
    def head_dims(self) -> tuple[int, int]:
        """See `Request`."""
        return self.query.shape[1] // self.num_heads, self.value.shape[1] // self.num_heads

    @property
    def grids(self) -> tuple[RegionGrid, ...]:
        """See `Request`."""
        return self.query_grid, self.kv_grid


def regional_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    region_graph: Tensor,
    region_size: tuple[int, int],
    kv_region_size: tuple[int, int] | None,
    auto_pad: bool,
) -> RegionalCall:
    """Checks the arguments of `functional.regional_routing_attention` and makes a call of them.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    _check_maps(query, key, value)
    scale, auto_pad = factor("scale", scale), flag("auto_pad", auto_pad)
    query_grid = _grid("query", query, "region_size", region_size, auto_pad)
    kv_grid = (
        _grid("key", key, "region_size", region_size, auto_pad)
        if kv_region_size is None
        else _grid("key", key, "kv_region_size", kv_region_size, auto_pad)
    )
    _check_graph(region_graph, query, value, query_grid, kv_grid)
    num_heads = region_graph.shape[1]
    # If one graph was expanded over the heads, use it as a single graph for all heads.
    graph = region_graph[:, :1] if region_graph.stride(1) == 0 else region_graph
    graph = _in_range(graph, kv_grid.n_regions)
    return RegionalCall(query, key, value, scale, graph, query_grid, kv_grid, num_heads)


def _check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        dense_floats(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (N, C, H, W), got shape {tuple(x.shape)}")
        if 0 in x.shape[2:]:
            raise ValueError(f"{name} must have a token, got shape {tuple(x.shape)}")
        for attribute in ("dtype", "device"):
            if getattr(x, attribute) != getattr(query, attribute):
                raise ValueError(
                    f"{name} must have the {attribute} of query, {getattr(query, attribute)}, "
                    f"got {getattr(x, attribute)}"
                )
    if key.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"key must have query's batch and channels, {tuple(query.shape[:2])}, "
            f"got shape {tuple(key.shape)}"
        )
    if value.shape[0] != key.shape[0] or value.shape[2:] != key.shape[2:]:
        raise ValueError(
            f"value must have key's batch, height and width, {(key.shape[0], *key.shape[2:])}, "
            f"got shape {tuple(value.shape)}"
        )


def _grid(name: str, x: Tensor, size_name: str, region_size: Any, auto_pad: bool) -> RegionGrid:
    height, width = whole_pair(size_name, region_size)
    grid = RegionGrid.of_region_size(x.shape[2], x.shape[3], (height, width))
    if grid.is_padded and not auto_pad:
        raise ValueError(
            f"{name}'s height and width must be multiples of {size_name}={(height, width)} if "
            f"auto_pad=False, got {x.shape[2]} x {x.shape[3]}"
        )
    return grid


def _check_graph(
    graph: Tensor, query: Tensor, value: Tensor, query_grid: RegionGrid, kv_grid: RegionGrid
) -> None:
    if not isinstance(graph, Tensor):
        raise TypeError(f"region_graph must be a tensor, got {graph!r}")
    if graph.dim() != 4 or graph.shape[0] != query.shape[0] or graph.shape[2] != query_grid.n_regions:
        raise ValueError(
            "region_graph must be (N, num_heads, P, topk) with "
            f"N={query.shape[0]} and P={query_grid.rows}*{query_grid.columns}={query_grid.n_regions}, "
            f"got shape {tuple(graph.shape)}"
        )
    if graph.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"region_graph must be int64 or int32, got {graph.dtype}")
    if graph.device != query.device:
        raise ValueError(f"region_graph must be on query's device, {query.device}, got {graph.device}")
    num_heads, topk = graph.shape[1], graph.shape[3]
    for name, x in (("query", query), ("value", value)):
        if num_heads < 1 or x.shape[1] < 1 or x.shape[1] % num_heads:
            raise ValueError(
                f"the heads of region_graph must divide {name}'s channels, {x.shape[1]}, got {num_heads}"
            )
    if not 1 <= topk <= kv_grid.n_regions:
        raise ValueError(
            f"region_graph's topk must be 1 to the number of key regions, "
            f"{kv_grid.rows}*{kv_grid.columns}={kv_grid.n_regions}, got {topk}"
        )


def _in_range(graph: Tensor, n_regions: int) -> Tensor:
    """The graph with all entries in `[0, n_regions)`.

    Checks the entries on the CPU, or if the environment variable that `CHECK` names is 1. Clamps them
    otherwise, and where they cannot be read.
    """
    if not _has_values(graph) or (graph.device.type != "cpu" and not _is_asked_for()):
        return graph.clamp(0, n_regions - 1)
    outside = graph[(graph < 0) | (graph >= n_regions)]
    if outside.numel():
        raise ValueError(
            f"region_graph must name key regions from 0 to {n_regions - 1}, got {int(outside[0])}"
        )
    return graph


def _is_asked_for() -> bool:
    """Whether the environment asks for a check on devices that the check would wait for."""
    value = os.environ.get(CHECK, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{CHECK} must be 0 or 1, got {value!r}")
    return value == "1"


def _has_values(x: Tensor) -> bool:
    """Whether the values of `x` can be read; False while a graph is recorded, for fakes and under vmap."""
    if not is_eager() or type(x) is not Tensor or x.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)
