"""Bi-level routing attention in plain einops: the definition of the semantics and the oracle of the tests.

It follows Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023), section
3.2, and rayleizhu/BiFormer: `ops/bra_legacy.py` for packed projections, `ops/bra_nchw.py` and
`ops/torch/rrsda.py` for a graph per head. The reference gathers the routed keys and values and holds the
attention matrix, which take `topk` times the memory of the map and `topk * S` scores per token. It shares no
computation with the other backends, except the order of equal logits.

Letters in the einops patterns: `n` batch, `(j i)` region row and column, `(h w)` token row and column in a
region, `m` head, `c` channel, `r` region, `t` chosen region, `s` token of a region.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .autocast import without_autocast
from .call import Call, Request, in_dtype_of
from .kernels.grid import RegionGrid
from .regional_call import RegionalCall
from .topk import select_topk


class Scored(NamedTuple):
    """The output of an attention, with the routing and the attention matrix that led to it.

    Attributes:
        out: `(N, H, W, dim)`.
        r_weight: `(N, P, topk)`: softmax over the logits of the chosen regions.
        r_idx: `(N, P, topk)` int64: the chosen regions.
        attn_weight: `(N*P, num_heads, S, topk*S_kv)`: the attention matrix.
    """

    out: Tensor
    r_weight: Tensor
    r_idx: Tensor
    attn_weight: Tensor


class ReferenceBackend:
    """The definition, as a backend; see `backend.protocol.Backend`."""

    name = "reference"

    def why_not(self, request: Request) -> str | None:
        """Returns None: this backend serves every call."""
        return None

    def attend(self, call: Call) -> Tensor:
        """See `Backend`."""
        return attend(call).out

    def route(self, call: Call) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        return route(call)

    def attend_regional(self, call: RegionalCall) -> Tensor:
        """See `Backend`."""
        return attend_regional(call)[0]


def attend(call: Call) -> Scored:
    """Routing, attention and LePE of a packed projection."""
    grid, spec = call.grid, call.spec
    r_weight, r_idx = route(call)
    factor = None
    if spec.routing_weight == "soft":
        factor = r_weight
    elif spec.routing_weight == "hard":  # exactly 1 in the forward; in the backward r_weight gets a gradient
        factor = 1 + (r_weight - r_weight.detach())
    out, attn_weight = _attend_to(call, r_idx, factor)
    if call.lepe_weight is not None:
        value = rearrange(padded(call)[..., -spec.dim :], "n h w c -> n c h w").contiguous()
        side = call.lepe_weight.shape[-1]
        bias = None if call.lepe_bias is None else call.lepe_bias.to(value.dtype)
        weight = call.lepe_weight.to(value.dtype)
        # A pair of sizes, because PyTorch 2.8 mistakes a single traced size for a missing one.
        lepe = F.conv2d(value, weight, bias, padding=(side // 2, side // 2), groups=spec.dim)
        out = out + rearrange(lepe, "n c h w -> n h w c")
    return Scored(out[:, : grid.height, : grid.width], r_weight, r_idx, attn_weight)


def route(call: Call) -> tuple[Tensor, Tensor]:
    """Region-to-region routing (paper, equations 3 and 4).

    Returns:
        `r_weight` (float32, or float64 for float64) and `r_idx` (int64), both `(N, P, topk)`.
    """
    spec = call.spec
    qkv = padded(call)
    query, key = (
        _region_means(x, call.grid, spec.counts_padding)
        for x in qkv[..., : 2 * spec.qk_dim].split(spec.qk_dim, dim=-1)
    )
    if call.router is not None:
        return call.router(query, key)
    if not spec.diff_routing:
        query, key = query.detach(), key.detach()
    return choose_regions(call.emb(query), call.emb(key), call.settings.topk, call.settings.routing_scale)


def choose_regions(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Chooses regions for region queries and keys `(N, P, qk_dim)`; returns the same as `route`."""
    with without_autocast(query):
        logits = (query * scale) @ rearrange(key, "n r c -> n c r")
    top_logits, r_idx = select_topk(logits, topk)
    return top_logits.softmax(dim=-1), r_idx


def attend_regional(call: RegionalCall) -> tuple[Tensor, Tensor]:
    """Token-to-token attention to the gathered tokens of given regions, a graph per head.

    Returns:
        `(N, C_v, H, W)` and the attention matrix `(N, num_heads, P, S, topk*S_kv)`.
    """
    grid = call.query_grid
    query = _split_heads(call.query, grid, call.num_heads)
    key, value = (
        _gather_per_head(_split_heads(x, call.kv_grid, call.num_heads), call.region_graph)
        for x in (call.key, call.value)
    )
    attn_weight = ((query * call.scale) @ rearrange(key, "n m r s c -> n m r c s")).softmax(dim=-1)
    out = rearrange(
        attn_weight @ value,
        "n m (j i) (h w) c -> n (m c) (j h) (i w)",
        j=grid.rows,
        h=grid.region_height,
        w=grid.region_width,
    )
    return out[..., : grid.height, : grid.width], attn_weight


def _attend_to(call: Call, r_idx: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token-to-token attention to the gathered tokens of the routed regions (paper, equation 6).

    Returns:
        The output on the padded map, and the attention matrix `(N*P, num_heads, S, topk*S_kv)`.
    """
    spec, grid, heads = call.spec, call.grid, {"m": call.spec.num_heads}
    query, key_value = _split_regions(padded(call), grid).split([spec.qk_dim, spec.qk_dim + spec.dim], dim=-1)
    # Reduce keys and values together, because they share the random samples of fractional pooling.
    reduced = rearrange(key_value, "n r h w c -> (n r) c h w")
    if call.kv_downsampling is not None:
        reduced = in_dtype_of(call.kv_downsampling, reduced).to(key_value.dtype)
    key_value = rearrange(reduced, "(n r) c h w -> n r (h w) c", r=grid.n_regions)
    image = rearrange(torch.arange(r_idx.shape[0], device=r_idx.device), "n -> n 1 1")
    chosen = key_value[image, r_idx]  # (n, r, t, s, c)
    if factor is not None:
        chosen = chosen * rearrange(factor, "n r t -> n r t 1 1").to(chosen.dtype)
    key, value = chosen.split([spec.qk_dim, spec.dim], dim=-1)

    query = rearrange(query, "n r h w (m c) -> (n r) m (h w) c", **heads)
    key = rearrange(key, "n r t s (m c) -> (n r) m c (t s)", **heads)
    value = rearrange(value, "n r t s (m c) -> (n r) m (t s) c", **heads)
    attn_weight = ((query * spec.scale) @ key).softmax(dim=-1)
    out = rearrange(
        attn_weight @ value,
        "(n j i) m (h w) c -> n (j h) (i w) (m c)",
        j=grid.rows,
        i=grid.columns,
        h=grid.region_height,
    )
    return out, attn_weight


def padded(call: Call) -> Tensor:
    """The packed projection, extended to whole regions; tokens past the edge hold `padding`, or else 0."""
    qkv, (bottom, right) = call.qkv, call.grid.padding
    if not call.grid.is_padded:
        return qkv
    if call.padding is None:
        return F.pad(qkv, (0, 0, 0, right, 0, bottom))
    rows = call.padding.to(qkv.dtype).expand(qkv.shape[0], bottom, qkv.shape[2], -1)
    columns = call.padding.to(qkv.dtype).expand(qkv.shape[0], qkv.shape[1] + bottom, right, -1)
    return torch.cat([torch.cat([qkv, rows], dim=1), columns], dim=2)


def _split_regions(x: Tensor, grid: RegionGrid) -> Tensor:
    """Regions of a padded map: `(n, H, W, c)` to `(n, r, h, w, c)`."""
    return rearrange(x, "n (j h) (i w) c -> n (j i) h w c", j=grid.rows, i=grid.columns)


def _region_means(x: Tensor, grid: RegionGrid, counts_padding: bool) -> Tensor:
    """Means over every region's tokens, `(n, r, c)`, of a padded map.

    They are at least float32: half precision would lead to other regions than in the other backends.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    regions = _split_regions(x, grid)
    if counts_padding or not grid.is_padded:
        return regions.mean(dim=(2, 3), dtype=dtype)
    in_map = x.new_zeros(1, x.shape[1], x.shape[2], 1)
    in_map[:, : grid.height, : grid.width] = 1
    in_map = _split_regions(in_map, grid)
    return (regions * in_map).sum(dim=(2, 3), dtype=dtype) / in_map.sum(dim=(2, 3), dtype=dtype)


def _split_heads(x: Tensor, grid: RegionGrid, num_heads: int) -> Tensor:
    """Zero-pads an NCHW map and splits it: `(n, (m c), H, W)` to `(n, m, r, s, c)`."""
    bottom, right = grid.padding
    return rearrange(
        F.pad(x, (0, right, 0, bottom)),
        "n (m c) (j h) (i w) -> n m (j i) (h w) c",
        m=num_heads,
        h=grid.region_height,
        w=grid.region_width,
    )


def _gather_per_head(x: Tensor, graph: Tensor) -> Tensor:
    """The tokens of all regions that each region chose: `(n, m, r', s, c)` to `(n, m, r, t*s, c)`."""
    image = rearrange(torch.arange(x.shape[0], device=x.device), "n -> n 1 1 1")
    head = rearrange(torch.arange(x.shape[1], device=x.device), "m -> m 1 1")
    return rearrange(x[image, head, graph.long()], "n m r t s c -> n m r (t s) c")
