"""The attention as one straight line of plain PyTorch operators, for tracing and export.

An exported graph cannot hold the operators of this package, and it need not save memory for a backward: it
gathers keys and values of all regions at once.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .. import reference
from ..call import Call, RegionalCall, Request
from ..kernels.grid import RegionGrid
from ..spec import AttentionSpec
from ..topk import select_topk
from .torch.regions import pad_map
from .torch.routing import region_means


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
    spec, qkv = call.spec, call.qkv
    if not spec.counts_padding:  # the NCHW form, whose regions depend on the size
        return reference.attend(call).out
    height, width = qkv.shape[1:3]
    if call.padding is not None:
        qkv = pad_map(qkv, RegionGrid.of_windows(height, width, spec.n_win), call.padding)
    # In float32 at least, as everywhere: half precision would choose other regions.
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    query, key = region_means(qkv, None, grid, 2 * spec.qk_dim).split(spec.qk_dim, dim=-1)
    logits = (call.emb(query) * spec.scale) @ call.emb(key).transpose(-2, -1)
    top_logits, r_idx = select_topk(logits, spec.topk)
    factor = top_logits.softmax(dim=-1) if spec.soft_routing else None
    out = _attend_to_routed(qkv, r_idx, spec, grid, call.kv_downsampling, factor)
    if call.lepe_weight is not None:
        value, side = rearrange(qkv[..., 2 * spec.qk_dim :], "n h w c -> n c h w"), call.lepe_weight.shape[-1]
        lepe = F.conv2d(value, call.lepe_weight, call.lepe_bias, padding=side // 2, groups=spec.dim)
        out = out + rearrange(lepe, "n c h w -> n h w c")
    return out if call.padding is None else out[:, :height, :width].contiguous()


def _attend_to_routed(
    qkv: Tensor,
    r_idx: Tensor,
    spec: AttentionSpec,
    grid: RegionGrid,
    kv_down: Callable[[Tensor], Tensor] | None,
    factor: Tensor | None,
) -> Tensor:
    sides = {"j": grid.rows, "i": grid.columns}
    regions = rearrange(qkv, "n (j h) (i w) c -> n (j i) h w c", **sides)
    query, key_value = regions.split([spec.qk_dim, spec.qk_dim + spec.dim], dim=-1)
    if kv_down is not None:
        reduced = kv_down(rearrange(key_value, "n p h w c -> (n p) c h w"))
        key_value = rearrange(reduced, "(n p) c h w -> n p h w c", p=grid.n_regions)
    key_value = key_value.flatten(2, 3)
    index = rearrange(r_idx, "n p t -> n (p t) 1 1").expand(-1, -1, *key_value.shape[2:])
    gathered = key_value.gather(1, index)
    if factor is not None:
        gathered = gathered * rearrange(factor, "n p t -> n (p t) 1 1").to(gathered.dtype)
    key, value = gathered.split([spec.qk_dim, spec.dim], dim=-1)
    heads = {"m": spec.num_heads}
    if spec.scale < 0:  # ONNX takes the root of the scale
        query = -query
    out = F.scaled_dot_product_attention(
        rearrange(query, "n p h w (m c) -> n p m (h w) c", **heads),
        rearrange(key, "n (p t) s (m c) -> n p m (t s) c", t=spec.topk, **heads),
        rearrange(value, "n (p t) s (m c) -> n p m (t s) c", t=spec.topk, **heads),
        scale=abs(spec.scale),
    )
    return rearrange(
        out, "n (j i) m (h w) c -> n (j h) (i w) (m c)", **sides, h=grid.region_height, w=grid.region_width
    )
