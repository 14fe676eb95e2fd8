"""The attention as one straight line of plain PyTorch operators, for tracing and export.

An exported graph cannot hold the operators of this package, and it need not save memory for a backward: it
gathers keys and values of all regions at once, or masks what was not chosen. Runtimes differ in the operators
that they have, so it makes do with few: no tensor has more than four axes, and nothing is sorted. Sizes of
the map may be symbols, which are not compared: maps are padded, and their padding is cut off, by computed
indices.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..call import Call, RegionalCall, Request
from ..kernels.grid import RegionGrid
from .torch.masked import is_cheaper_for

# Chosen regions are a share of all that no other size of the map changes: where it is at least so large, a
# mask is taken for small maps. A graph that was traced serves larger ones, too, and then computes at most so
# many times the scores.
_MOST_REGIONS_PER_CHOICE = 4
# What hides a key that was not chosen: in half precision minus infinity.
_NOT_CHOSEN = -1e30


class ExportedBackend:
    """Stands in for the fused backends while a graph is exported; see `protocol.Backend`."""

    name = "exported"

    def why_not(self, request: Request) -> str | None:
        """None: it serves everything."""
        return None

    def attend(self, call: Call) -> Tensor:
        """See `Backend`."""
        return _attend(call)

    def route(self, call: Call) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        return reference.route(call)

    def attend_regional(self, call: RegionalCall) -> Tensor:
        """See `Backend`."""
        return reference.attend_regional(call)[0]


def _attend(call: Call) -> Tensor:
    spec, grid = call.spec, call.grid
    qkv, padding = call.qkv, call.padding if grid.is_padded else None
    if padding is not None:
        qkv = _padded(qkv, padding, grid)
    out = (_masked if _is_masked(call) else _gathered)(qkv, call)
    if call.lepe_weight is not None:
        v, side = qkv[..., 2 * spec.qk_dim :].permute(0, 3, 1, 2), call.lepe_weight.shape[-1]
        # Twice, since PyTorch 2.8 takes one size that it traces for none.
        lepe = F.conv2d(v, call.lepe_weight, call.lepe_bias, padding=(side // 2, side // 2), groups=spec.dim)
        out = out + lepe.permute(0, 2, 3, 1)
    if padding is None:
        return out
    rows, columns = (torch.arange(side, device=out.device) for side in (grid.height, grid.width))
    return out.index_select(1, rows).index_select(2, columns)


def _is_masked(call: Call) -> bool:
    """Whether a mask takes less time than gathering: in ONNX Runtime and OpenVINO as on the torch backend."""
    spec, grid = call.spec, call.grid
    if spec.soft_routing or call.kv_downsampling is not None or _is_symbolic(grid):
        return False
    if torch.jit.is_tracing():
        with warnings.catch_warnings():  # The example's size decides, for all sizes: either form is right.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            grid = RegionGrid(*map(int, grid.numbers))
    few = grid.n_regions <= _MOST_REGIONS_PER_CHOICE * spec.topk
    return few and is_cheaper_for(grid, grid, spec.topk)


def _masked(qkv: Tensor, call: Call) -> Tensor:
    """The attention to all keys, those not chosen hidden: `(N, rows * h, columns * w, dim)`.

    A key that is not finite reaches all queries of its head.
    """
    spec, grid = call.spec, call.grid
    widths = [spec.qk_dim, spec.qk_dim, spec.dim]
    of_queries, of_keys, _ = _cut(qkv, grid).split(widths, dim=-1)
    _, chosen = _route(of_queries, of_keys, call)
    region = torch.arange(grid.n_regions, device=qkv.device)
    # Regions of one image again, and marks instead of indices, since few runtimes scatter.
    chosen = (chosen % grid.n_regions).reshape(-1, grid.n_regions, chosen.shape[-1], 1)
    mask = (1 - (chosen == region).float().sum(2)) * _NOT_CHOSEN
    of_token = _regions(grid, qkv.device).flatten()
    mask = mask.index_select(2, of_token).index_select(1, of_token)[:, None]
    query, key, value = (_by_head(x, spec.num_heads) for x in qkv.flatten(1, 2).split(widths, dim=-1))
    scores = (query * spec.scale) @ key.transpose(2, 3) + mask.to(qkv.dtype)
    out = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    return out.reshape(*qkv.shape[:3], spec.dim)


def _gathered(qkv: Tensor, call: Call) -> Tensor:
    """As `_masked`, but to gathered keys."""
    spec, grid = call.spec, call.grid
    regions = _cut(qkv, grid)
    query, key, value = regions.split([spec.qk_dim, spec.qk_dim, spec.dim], dim=-1)
    weight, chosen = _route(query, key, call)
    if call.kv_downsampling is not None:
        maps = regions[..., spec.qk_dim :].transpose(1, 2)
        maps = maps.reshape(*maps.shape[:2], grid.region_height, grid.region_width)
        pooled = call.kv_downsampling(maps).flatten(2).transpose(1, 2)
        key, value = pooled.split([spec.qk_dim, spec.dim], dim=-1)
    # Each by itself: ONNX Runtime takes as long to split what was gathered as for all products.
    key, value = key[chosen], value[chosen]
    if spec.soft_routing:
        key, value = (x * weight[..., None, None].to(x.dtype) for x in (key, value))
    key, value = key.flatten(1, 2), value.flatten(1, 2)
    query, key, value = (_by_head(x, spec.num_heads) for x in (query, key, value))
    # Not scaled_dot_product_attention: opsets before 14 have none, and later ones none of a negative scale.
    scores = (query * spec.scale) @ key.transpose(2, 3)
    out = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    return _put_together(out, grid, spec.dim)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """`(N, tokens, num_heads * C)` as `(N, num_heads, tokens, C)`."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _route(query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Routing weights and chosen regions, both `(N*P, topk)`, of queries and keys `(N*P, S, qk_dim)`.

    Regions are counted through all images. Of equal logits that with the smaller index is chosen; the chosen
    ones are in no particular order.
    """
    settings, grid = call.settings, call.grid
    n_regions = grid.n_regions
    first = torch.arange(query.shape[0] // n_regions, device=query.device) * n_regions
    query, key = (call.emb(_means(x, call)) for x in (query, key))
    logits = (query * settings.routing_scale) @ key.transpose(1, 2)
    # topk may choose among equal logits as it likes, and few runtimes sort stably. So it chooses once more,
    # where nothing is equal: what is above the least chosen logit, then what equals it, then the rest.
    least = logits.topk(settings.topk).values[..., -1:]
    above = (logits > least).float() + (logits >= least).float()
    index = torch.arange(n_regions, device=logits.device)
    chosen = (above * n_regions - index).topk(settings.topk).indices
    weight = logits.gather(2, chosen).softmax(dim=-1)
    return weight.flatten(0, 1), (chosen + first[:, None, None]).flatten(0, 1)


def _means(x: Tensor, call: Call) -> Tensor:
    """Means over the tokens of regions `(N*P, S, C)`: `(N, P, C)`.

    In float32 at least, as everywhere: half precision would choose other regions. Means, not sums that are
    divided: in those OpenVINO 2026.4 adds up along another axis.
    """
    means = x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
    means = means.reshape(-1, call.grid.n_regions, x.shape[-1])
    if not call.settings.counts_padding:
        means = means * (call.grid.region_tokens / _tokens_inside(call.grid, x.device))
    return means


def _tokens_inside(grid: RegionGrid, device: torch.device) -> Tensor:
    """How many of each region's tokens are no padding: `(P, 1)`."""
    region_height, region_width, columns = _as_tensors(grid, device)
    region = torch.arange(grid.n_regions, device=device)[:, None]
    high = (grid.height - region // columns * region_height).float().clamp(max=grid.region_height)
    wide = (grid.width - region % columns * region_width).float().clamp(max=grid.region_width)
    return high * wide


def _padded(x: Tensor, padding: Tensor, grid: RegionGrid) -> Tensor:
    """The map `(N, H, W, C)` on whole regions: past its edge stands `padding`, `(C,)`."""
    rows, columns = (
        torch.arange(count * side, device=x.device)
        for count, side in ((grid.rows, grid.region_height), (grid.columns, grid.region_width))
    )
    in_rows, in_columns = rows < grid.height, columns < grid.width
    # Past the edge stands for now the first row or column: opset 11 clamps no integers.
    x = x.index_select(1, rows * in_rows).index_select(2, columns * in_columns)
    return torch.where((in_rows[:, None] & in_columns)[..., None], x, padding.to(x.dtype))


def _cut(x: Tensor, grid: RegionGrid) -> Tensor:
    """A map of whole regions `(N, rows * h, columns * w, C)` as regions, `(N * P, h * w, C)`."""
    channels = x.shape[-1]
    if _is_symbolic(grid):
        return x.flatten(1, 2)[:, _tokens(grid, x.device)].flatten(0, 1)
    rows = x.reshape(-1, grid.region_height, grid.columns, grid.region_width * channels)
    return rows.transpose(1, 2).reshape(-1, grid.region_tokens, channels)


def _put_together(x: Tensor, grid: RegionGrid, channels: int) -> Tensor:
    """Undoes `_cut`, of any shape with the elements of `(N * P, h * w, C)` in their order."""
    if _is_symbolic(grid):
        return x.reshape(-1, grid.n_regions * grid.region_tokens, channels)[:, _positions(grid, x.device)]
    rows = x.reshape(-1, grid.columns, grid.region_height, grid.region_width * channels)
    height, width = grid.rows * grid.region_height, grid.columns * grid.region_width
    return rows.transpose(1, 2).reshape(-1, height, width, channels)


def _is_symbolic(grid: RegionGrid) -> bool:
    """Whether `torch.export` records sizes as symbols, which reshaping would compare as `_cut` does it.

    Indices compare nothing, but runtimes take longer to gather by them than to transpose.
    """
    return any(isinstance(number, torch.SymInt) for number in grid.numbers)


def _tokens(grid: RegionGrid, device: torch.device) -> Tensor:
    """Where the tokens of the regions lie on the padded map: `(P, S)`; `RegionGrid.token` of all."""
    region_height, region_width, columns = _as_tensors(grid, device)
    region = torch.arange(grid.n_regions, device=device)[:, None]
    token = torch.arange(grid.region_tokens, device=device)
    row = region // columns * region_height + token // region_width
    column = region % columns * region_width + token % region_width
    return row * (columns * region_width) + column


def _regions(grid: RegionGrid, device: torch.device) -> Tensor:
    """The region of every token of the padded map, `(rows * h, columns * w)`."""
    region_height, region_width, columns = _as_tensors(grid, device)
    row = torch.arange(grid.rows * grid.region_height, device=device)[:, None]
    column = torch.arange(grid.columns * grid.region_width, device=device)
    return row // region_height * columns + column // region_width


def _positions(grid: RegionGrid, device: torch.device) -> Tensor:
    """Where the tokens of the padded map lie among those of the regions, `(rows * h, columns * w)`."""
    region_height, region_width, _ = _as_tensors(grid, device)
    row = torch.arange(grid.rows * grid.region_height, device=device)[:, None]
    column = torch.arange(grid.columns * grid.region_width, device=device)
    region = _regions(grid, device)
    return (region * region_height + row % region_height) * region_width + column % region_width


def _as_tensors(grid: RegionGrid, device: torch.device) -> list[Tensor]:
    """Region height, region width and columns, `(1,)` each: ONNX divides by no symbol (PyTorch 2.14)."""
    sizes = (grid.region_height, grid.region_width, grid.columns)
    return [torch.full((1,), size, dtype=torch.int64, device=device) for size in sizes]
