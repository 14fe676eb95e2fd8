"""The NCHW form of bi-level routing attention in plain einops: its definition and the oracle of the tests.

After rayleizhu/BiFormer `ops/bra_nchw.py` and `ops/torch/rrsda.py`, whose arguments and `state_dict` keys it
keeps. It differs from `reference` in this: 1x1 convolutions project; regions have a given size, so that a map
may have more of them than `n_win` a side; the router's logits are not scaled; queries, keys and values are
zero-padded *after* the projection, so that a padded key has logit 0 and value 0; every head may have a graph
of its own, and keys and values a grid of their own.

Letters in the einops patterns are those of `reference`: `n` batch, `(j i)` region row and column, `(h w)`
token row and column in a region, `m` head, `c` channel, `r` region, `t` chosen region, `s` token of a region.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .kernels.grid import RegionGrid
from .routing import select_topk
from .spec import AttentionSpec


class NCHWBiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention over an NCHW map, with the arguments and `state_dict` keys of `nchwBRA`.

    Regions are `(H // n_win, W // n_win)` tokens large: where that leaves a rest, there are more than `n_win`
    of them a side, and the last are padded. Padding is no choice here, as in the original, which ignores
    `auto_pad`.

    Args:
        dim: channels of the map.
        num_heads: attention heads; divides `dim`.
        n_win: regions a side, if it divides the side.
        qk_scale: factor of the tokens' logits; `dim ** -0.5` by default (of all heads together, on purpose).
        topk: regions that every region attends to, 1 to `n_win**2`.
        side_dwconv: kernel size (odd) of the depthwise convolution of the values, LePE; 0 for none.
        auto_pad: take maps of fewer than `n_win` tokens a side too, which the original does not: regions are
            then one token high or wide, and where there are fewer than `topk`, all are attended to.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
    ) -> None:
        super().__init__()
        self.spec = AttentionSpec(dim, dim, num_heads, n_win, topk, qk_scale)
        if side_dwconv != 0 and (side_dwconv < 0 or side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv must be 0 or an odd kernel size, got {side_dwconv}")
        self.auto_pad = auto_pad
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim) if side_dwconv else None
        )
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, dim, H, W)`.
            ret_attn_mask: return the attention matrix too.

        Returns:
            `(N, dim, H, W)`; with `ret_attn_mask` also `attn_weight` `(N, num_heads, P, S, topk*S)`.
        """
        grid = self.grid(x)
        query, key, value = self.qkv_linear(x).chunk(3, dim=1)
        r_idx = route(query, key, grid, self._topk(grid))
        graph = rearrange(r_idx, "n r t -> n 1 r t").expand(-1, self.spec.num_heads, -1, -1)
        region_size = (grid.region_height, grid.region_width)
        out, attn_weight = regional_routing_attention(query, key, value, self.spec.scale, graph, region_size)
        if self.lepe is not None:
            # Its module is not called, as the fused backends do not: hooks see the same everywhere.
            out = out + F.conv2d(
                value, self.lepe.weight, self.lepe.bias, padding=self.lepe.padding, groups=self.lepe.groups
            )
        out = self.output_linear(out)
        return (out, attn_weight) if ret_attn_mask else out

    def grid(self, x: Tensor) -> RegionGrid:
        """The regions of a map `(N, dim, H, W)`; raises ValueError where it has none."""
        if x.dim() != 4 or x.shape[1] != self.spec.dim:
            raise ValueError(f"x must be (N, dim, H, W) with dim={self.spec.dim}, got shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        region_size = (height // self.spec.n_win, width // self.spec.n_win)
        if self.auto_pad:  # `or` keeps a side that is being traced, which max(1, side) would fix at 1
            region_size = (region_size[0] or 1, region_size[1] or 1)
        elif min(region_size) < 1:
            raise ValueError(
                f"the map's height and width must be at least n_win={self.spec.n_win}, got "
                f"{height} x {width}; auto_pad=True takes smaller ones"
            )
        return RegionGrid.of_region_size(height, width, region_size)

    def _topk(self, grid: RegionGrid) -> int:
        # Fewer regions than topk there are only where auto_pad admitted a map smaller than n_win.
        return min(self.spec.topk, grid.n_regions)


def route(query: Tensor, key: Tensor, grid: RegionGrid, topk: int) -> Tensor:
    """Routes by the regions' mean queries and keys, padding left out of the means; detached.

    In float32 at least, since half precision would choose other regions, and in the same steps for all sizes,
    since exported graphs serve others.

    Args:
        query: `(N, C, H, W)`.
        key: as `query`.
        grid: regions of both.
        topk: regions to choose for every region; equal logits by the smaller index first.

    Returns:
        `r_idx` `(N, P, topk)`, int64.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, count = (
        _split_regions(x, grid, 1).sum((1, 3), dtype=dtype)
        for x in (query.detach(), key.detach(), torch.ones_like(query[:1, :1]))
    )
    with torch.autocast(query.device.type, enabled=False):
        logits = (query / count) @ rearrange(key / count, "n r c -> n c r")
    return select_topk(logits, topk)[1]


def regional_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    region_graph: Tensor,
    region_size: tuple[int, int],
    kv_region_size: tuple[int, int] | None = None,
    auto_pad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Token-to-token attention to the gathered tokens of the routed regions, a graph per head.

    Args:
        query: `(N, C, H, W)`.
        key: `(N, C, H_kv, W_kv)`; the map may differ from the queries' in size and number of regions.
        value: `(N, C_v, H_kv, W_kv)`.
        scale: factor of the logits, positive.
        region_graph: `(N, num_heads, P, topk)`, int64 or int32: key regions that every query region attends
            to, in `[0, P_kv)`; `num_heads` divides `C` and `C_v`. A region named twice counts twice.
        region_size: tokens a column and a row of a query region.
        kv_region_size: the same of a key region; `region_size` by default.
        auto_pad: zero-pad maps at the bottom and right to multiples of the region sizes; padded keys take
            part, with logit 0 and value 0.

    Returns:
        `(N, C_v, H, W)` and the attention matrix `(N, num_heads, P, S, topk*S_kv)`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    query_grid, kv_grid = check_arguments(
        query, key, value, scale, region_graph, region_size, kv_region_size, auto_pad
    )
    num_heads = region_graph.shape[1]
    query_regions = _split_regions(query, query_grid, num_heads)
    key_regions, value_regions = (
        _gather_regions(_split_regions(x, kv_grid, num_heads), region_graph) for x in (key, value)
    )
    attn_weight = ((query_regions * scale) @ rearrange(key_regions, "n m r s c -> n m r c s")).softmax(dim=-1)
    out = rearrange(
        attn_weight @ value_regions,
        "n m (j i) (h w) c -> n (m c) (j h) (i w)",
        j=query_grid.rows,
        h=query_grid.region_height,
        w=query_grid.region_width,
    )
    return out[..., : query_grid.height, : query_grid.width], attn_weight


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    region_graph: Tensor,
    region_size: tuple[int, int],
    kv_region_size: tuple[int, int] | None = None,
    auto_pad: bool = True,
) -> tuple[RegionGrid, RegionGrid]:
    """The grids of queries and of keys; arguments and errors as for `regional_routing_attention`."""
    _check_maps(query, key, value)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    query_grid = _grid("query", query, "region_size", region_size, auto_pad)
    kv_grid = (
        _grid("key", key, "region_size", region_size, auto_pad)
        if kv_region_size is None
        else _grid("key", key, "kv_region_size", kv_region_size, auto_pad)
    )
    _check_graph(region_graph, query, value, query_grid, kv_grid)
    return query_grid, kv_grid


def _check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (N, C, H, W), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {x.dtype}")
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
    is_pair = isinstance(region_size, tuple | list) and len(region_size) == 2
    if not is_pair or any(isinstance(side, bool | float | str) or side < 1 for side in region_size):
        raise ValueError(f"{size_name} must be two ints of at least 1, got {region_size!r}")
    grid = RegionGrid.of_region_size(x.shape[2], x.shape[3], (region_size[0], region_size[1]))
    if grid.is_padded and not auto_pad:
        raise ValueError(
            f"{name}'s height and width must be multiples of {size_name}={tuple(region_size)} where "
            f"auto_pad=False, got {x.shape[2]} x {x.shape[3]}"
        )
    return grid


def _check_graph(
    graph: Tensor, query: Tensor, value: Tensor, query_grid: RegionGrid, kv_grid: RegionGrid
) -> None:
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


def _split_regions(x: Tensor, grid: RegionGrid, num_heads: int) -> Tensor:
    """Zero-pads and splits: `(n, (m c), H, W)` to `(n, m, r, s, c)`."""
    bottom, right = grid.padding
    return rearrange(
        F.pad(x, (0, right, 0, bottom)),
        "n (m c) (j h) (i w) -> n m (j i) (h w) c",
        m=num_heads,
        h=grid.region_height,
        w=grid.region_width,
    )


def _gather_regions(x: Tensor, graph: Tensor) -> Tensor:
    """The tokens of all regions that each region chose: `(n, m, r', s, c)` to `(n, m, r, t*s, c)`."""
    image = rearrange(torch.arange(x.shape[0], device=x.device), "n -> n 1 1 1")
    head = rearrange(torch.arange(x.shape[1], device=x.device), "m -> m 1 1")
    return rearrange(x[image, head, graph.long()], "n m r t s c -> n m r (t s) c")
