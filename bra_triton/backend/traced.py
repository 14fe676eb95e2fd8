"""The attention as one straight line of plain PyTorch operators, for tracing and export.

An exported graph cannot hold the operators of this package, and it need not save memory for a backward: it
gathers keys and values of all regions at once.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..kernels.region_grid import RegionGrid
from ..routing import select_topk
from ..spec import AttentionSpec
from .torch_backend import region_means


def attend(qkv: Tensor, spec: AttentionSpec, lepe_weight: Tensor | None, lepe_bias: Tensor | None) -> Tensor:
    """Routing, attention and LePE of a packed projection; arguments as for `functional.attend`."""
    # In float32 at least, as everywhere: half precision would choose other regions.
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    query, key = region_means(qkv, spec, dtype).split(spec.qk_dim, dim=-1)
    _, r_idx = select_topk((query * spec.scale) @ key.transpose(-2, -1), spec.topk)
    out = _attend_to_routed(qkv, r_idx, spec)
    if lepe_weight is None:
        return out
    value = rearrange(qkv[..., 2 * spec.qk_dim :], "n h w c -> n c h w")
    lepe = F.conv2d(value, lepe_weight, lepe_bias, padding=lepe_weight.shape[-1] // 2, groups=spec.dim)
    return out + rearrange(lepe, "n c h w -> n h w c")


def _attend_to_routed(qkv: Tensor, r_idx: Tensor, spec: AttentionSpec) -> Tensor:
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    sides = {"j": spec.n_win, "i": spec.n_win}
    regions = rearrange(qkv, "n (j h) (i w) c -> n (j i) (h w) c", **sides)
    query, key_value = regions.split([spec.qk_dim, spec.qk_dim + spec.dim], dim=-1)
    index = rearrange(r_idx, "n p t -> n (p t) 1 1").expand(-1, -1, *key_value.shape[2:])
    gathered = key_value.gather(1, index)
    key, value = gathered.split([spec.qk_dim, spec.dim], dim=-1)
    heads = {"m": spec.num_heads}
    out = F.scaled_dot_product_attention(
        rearrange(query, "n p s (m c) -> n p m s c", **heads),
        rearrange(key, "n (p t) s (m c) -> n p m (t s) c", t=spec.topk, **heads),
        rearrange(value, "n (p t) s (m c) -> n p m (t s) c", t=spec.topk, **heads),
        scale=spec.scale,
    )
    return rearrange(
        out, "n (j i) m (h w) c -> n (j h) (i w) (m c)", **sides, h=grid.region_height, w=grid.region_width
    )
