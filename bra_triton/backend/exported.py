"""The attention as a straight sequence of plain PyTorch operators, for tracing and export.

An exported graph cannot hold the operators of this package, and it has no backward for which memory must be
saved. So the attention here gathers the keys and values of all regions at once, or attends to all keys and
masks those that were not chosen. It uses few operators, because not every runtime has all of them: no tensor
has more than four axes, and nothing is sorted. The map's sizes may be symbols, which must not be compared
with each other. Therefore maps are padded, and their padding is cut off, by computed indices.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..call import Call, Request
from ..kernels.grid import RegionGrid
from ..regional_call import RegionalCall
from .torch.masked import is_cheaper_for

# A mask is used only if the map has at most this many regions for each chosen one. With `n_win` regions a
# side, this ratio is the same for all sizes of the map. A graph that was traced with a small map may also get
# larger ones, for which gathering would be faster; under the mask it then computes at most this many times
# the scores.
_MOST_REGIONS_PER_CHOICE = 4
# Added to the scores of a key that was not chosen, so that its probability is 0. Float16 rounds it to minus
# infinity.
_NOT_CHOSEN = -1e30


class ExportedBackend:
    """Stands in for the fused backends while a graph is exported; see `protocol.Backend`."""

    name = "exported"

    def why_not(self, request: Request) -> str | None:
        """Returns None: this backend serves every call."""
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
        weight = call.lepe_weight.to(v.dtype)
        bias = None if call.lepe_bias is None else call.lepe_bias.to(v.dtype)
        # A pair of sizes, because PyTorch 2.8 mistakes a single traced size for a missing one.
        lepe = F.conv2d(v, weight, bias, padding=(side // 2, side // 2), groups=spec.dim)
        out = out + lepe.permute(0, 2, 3, 1)
    if padding is None:
        return out
    rows, columns = (torch.arange(side, device=out.device) for side in (grid.height, grid.width))
    return out.index_select(1, rows).index_select(2, columns)


def _is_masked(call: Call) -> bool:
    """Whether a mask takes less time than gathering.

    The torch backend's rule holds for ONNX Runtime and OpenVINO, too.
    """
    spec, grid = call.spec, call.grid
    if spec.soft_routing or call.kv_downsampling is not None or _is_symbolic(grid):
        return False
    if torch.jit.is_tracing():
        # The size of the traced example decides for all sizes. Both forms are correct for every size.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            grid = RegionGrid(*map(int, grid.numbers))
    few = grid.n_regions <= _MOST_REGIONS_PER_CHOICE * spec.topk
    return few and is_cheaper_for(grid, grid, spec.topk)


def _masked(qkv: Tensor, call: Call) -> Tensor:
    """Attends to all keys and hides those that were not chosen: `(N, rows * h, columns * w, dim)`.

    A key or value that is not finite affects all queries of its head, even where it was not chosen.
    """
    spec, grid = call.spec, call.grid
    widths = [spec.qk_dim, spec.qk_dim, spec.dim]
    of_queries, of_keys, _ = _cut(qkv, grid).split(widths, dim=-1)
    _, chosen = _route(of_queries, of_keys, call)
    region = torch.arange(grid.n_regions, device=qkv.device)
    # `_route` numbers regions through all images; go back to numbers inside one image. Make the mask by a
    # comparison with all region numbers, because few runtimes have a scatter.
    chosen = (chosen % grid.n_regions).reshape(-1, grid.n_regions, chosen.shape[-1], 1)
    mask = (1 - (chosen == region).float().sum(2)) * _NOT_CHOSEN
    of_token = _regions(grid, qkv.device).flatten()
    mask = mask.index_select(2, of_token).index_select(1, of_token)[:, None]
    query, key, value = (_by_head(x, spec.num_heads) for x in qkv.flatten(1, 2).split(widths, dim=-1))
    scores = (query * spec.scale) @ key.transpose(2, 3) + mask.to(qkv.dtype)
    out = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    return out.reshape(*qkv.shape[:3], spec.dim)


def _gathered(qkv: Tensor, call: Call) -> Tensor:
    """As `_masked`, but gathers the keys and values of the chosen regions."""
    spec, grid = call.spec, call.grid
    regions = _cut(qkv, grid)
    query, key, value = regions.split([spec.qk_dim, spec.qk_dim, spec.dim], dim=-1)
    weight, chosen = _route(query, key, call)
    if call.kv_downsampling is not None:
        maps = regions[..., spec.qk_dim :].transpose(1, 2)
        maps = maps.reshape(*maps.shape[:2], grid.region_height, grid.region_width)
        pooled = call.kv_downsampling(maps).flatten(2).transpose(1, 2)
        key, value = pooled.split([spec.qk_dim, spec.dim], dim=-1)
    # Gather keys and values separately. If they are gathered together, ONNX Runtime takes as long to split
    # them as to compute all products.
    key, value = key[chosen], value[chosen]
    if spec.soft_routing:
        key, value = (x * weight[..., None, None].to(x.dtype) for x in (key, value))
    key, value = key.flatten(1, 2), value.flatten(1, 2)
    query, key, value = (_by_head(x, spec.num_heads) for x in (query, key, value))
    # Not scaled_dot_product_attention: it can be exported only to opset 14 or later, and there only with a
    # positive scale.
    scores = (query * spec.scale) @ key.transpose(2, 3)
    out = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    return _put_together(out, grid, spec.dim)


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """Reshapes `(N, tokens, num_heads * C)` to `(N, num_heads, tokens, C)`."""
    return x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _route(query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Routing weights and chosen regions, both `(N*P, topk)`, of queries and keys `(N*P, S, qk_dim)`.

    Regions are numbered through all images of the batch. Among equal logits the smaller region number is
    chosen. The chosen regions are in no particular order.
    """
    settings, grid = call.settings, call.grid
    n_regions = grid.n_regions
    first = torch.arange(query.shape[0] // n_regions, device=query.device) * n_regions
    query, key = (call.emb(_means(x, call)) for x in (query, key))
    logits = (query * settings.routing_scale) @ key.transpose(1, 2)
    # topk may choose any of several equal logits, and few runtimes have a stable sort. So a second topk
    # chooses by a number that no two regions share. It ranks logits above the least chosen one first, then
    # those equal to it, then the rest, and inside each of these groups the smaller region number first.
    least = logits.topk(settings.topk).values[..., -1:]
    above = (logits > least).float() + (logits >= least).float()
    index = torch.arange(n_regions, device=logits.device)
    chosen = (above * n_regions - index).topk(settings.topk).indices
    weight = logits.gather(2, chosen).softmax(dim=-1)
    return weight.flatten(0, 1), (chosen + first[:, None, None]).flatten(0, 1)


def _means(x: Tensor, call: Call) -> Tensor:
    """Means over the tokens of regions `(N*P, S, C)`: `(N, P, C)`.

    They are at least float32, as in all backends: half precision would lead to the choice of other regions.
    They are computed by `mean`, because OpenVINO 2026.4 computes a sum that is divided along a wrong axis.
    """
    means = x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
    means = means.reshape(-1, call.grid.n_regions, x.shape[-1])
    if not call.settings.counts_padding:
        means = means * (call.grid.region_tokens / _tokens_inside(call.grid, x.device))
    return means


def _tokens_inside(grid: RegionGrid, device: torch.device) -> Tensor:
    """The number of tokens of each region that lie inside the map: `(P, 1)`, float32."""
    region_height, region_width, columns = _as_tensors(grid, device)
    region = torch.arange(grid.n_regions, device=device)[:, None]
    high = (grid.height - region // columns * region_height).float().clamp(max=grid.region_height)
    wide = (grid.width - region % columns * region_width).float().clamp(max=grid.region_width)
    return high * wide


def _padded(x: Tensor, padding: Tensor, grid: RegionGrid) -> Tensor:
    """Extends a map `(N, H, W, C)` to whole regions; tokens past its edge hold `padding`, `(C,)`."""
    rows, columns = (
        torch.arange(count * side, device=x.device)
        for count, side in ((grid.rows, grid.region_height), (grid.columns, grid.region_width))
    )
    in_rows, in_columns = rows < grid.height, columns < grid.width
    # Past the edge, read the first row or column, which `where` replaces below. Clamping the indices would
    # need a clamp of integers, which opset 11 does not have.
    x = x.index_select(1, rows * in_rows).index_select(2, columns * in_columns)
    return torch.where((in_rows[:, None] & in_columns)[..., None], x, padding.to(x.dtype))


def _cut(x: Tensor, grid: RegionGrid) -> Tensor:
    """Cuts a map of whole regions `(N, rows * h, columns * w, C)` into regions `(N * P, h * w, C)`."""
    channels = x.shape[-1]
    if _is_symbolic(grid):
        return x.flatten(1, 2)[:, _tokens(grid, x.device)].flatten(0, 1)
    rows = x.reshape(-1, grid.region_height, grid.columns, grid.region_width * channels)
    return rows.transpose(1, 2).reshape(-1, grid.region_tokens, channels)


def _put_together(x: Tensor, grid: RegionGrid, channels: int) -> Tensor:
    """Undoes `_cut`; `x` may have any shape if its elements are in the order of `(N * P, h * w, C)`."""
    if _is_symbolic(grid):
        return x.reshape(-1, grid.n_regions * grid.region_tokens, channels)[:, _positions(grid, x.device)]
    rows = x.reshape(-1, grid.columns, grid.region_height, grid.region_width * channels)
    height, width = grid.rows * grid.region_height, grid.columns * grid.region_width
    return rows.transpose(1, 2).reshape(-1, height, width, channels)


def _is_symbolic(grid: RegionGrid) -> bool:
    """Whether `torch.export` records the sizes as symbols.

    `_cut` and `_put_together` gather by indices then, because reshaping would compare symbols. Sizes that are
    numbers are reshaped and transposed, which takes runtimes less time than gathering.
    """
    return any(isinstance(number, torch.SymInt) for number in grid.numbers)


def _tokens(grid: RegionGrid, device: torch.device) -> Tensor:
    """Row-major positions of all regions' tokens on the padded map: `(P, S)`; compare `RegionGrid.token`."""
    region_height, region_width, columns = _as_tensors(grid, device)
    region = torch.arange(grid.n_regions, device=device)[:, None]
    token = torch.arange(grid.region_tokens, device=device)
    row = region // columns * region_height + token // region_width
    column = region % columns * region_width + token % region_width
    return row * (columns * region_width) + column


def _regions(grid: RegionGrid, device: torch.device) -> Tensor:
    """The region number of every token of the padded map: `(rows * h, columns * w)`."""
    region_height, region_width, columns = _as_tensors(grid, device)
    row = torch.arange(grid.rows * grid.region_height, device=device)[:, None]
    column = torch.arange(grid.columns * grid.region_width, device=device)
    return row // region_height * columns + column // region_width


def _positions(grid: RegionGrid, device: torch.device) -> Tensor:
    """Positions of the padded map's tokens in the list of all regions' tokens: `(rows * h, columns * w)`."""
    region_height, region_width, _ = _as_tensors(grid, device)
    row = torch.arange(grid.rows * grid.region_height, device=device)[:, None]
    column = torch.arange(grid.columns * grid.region_width, device=device)
    region = _regions(grid, device)
    return (region * region_height + row % region_height) * region_width + column % region_width


def _as_tensors(grid: RegionGrid, device: torch.device) -> list[Tensor]:
    """Region height, region width and columns as tensors `(1,)`, int64.

    The ONNX export of PyTorch 2.14 cannot divide by a symbol.
    """
    sizes = (grid.region_height, grid.region_width, grid.columns)
    return [torch.full((1,), size, dtype=torch.int64, device=device) for size in sizes]
