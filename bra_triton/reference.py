"""Bi-level routing attention in plain einops: the definition of the semantics and the oracle of the tests.

After Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023), section 3.2,
and rayleizhu/BiFormer `ops/bra_legacy.py`, whose arguments and `state_dict` keys it keeps. It gathers the
routed keys and values and holds the attention matrix: `topk` times the map and `topk * S` scores per token.

Letters in the einops patterns: `n` batch, `(j i)` region row and column, `(h w)` token row and column in a
region, `m` head, `c` channel, `r` region, `t` chosen region ("slot"), `s` token of a region.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from . import downsampling
from .backend.region_layout import pad_map
from .export import being_exported
from .kernels.grid import RegionGrid
from .routing import select_topk
from .spec import AttentionSpec

PARAM_ATTENTION_MODES = ("qkvo", "qkv")


class TopkRouting(nn.Module):
    """Region-to-region routing: which `topk` regions every region attends to (paper, equations 3 and 4).

    Args:
        qk_dim: channels of a region's query and key.
        topk: regions to choose.
        qk_scale: factor of the logits; `qk_dim ** -0.5` by default.
        param_routing: apply one shared linear layer to queries and keys first.
        diff_routing: let the gradient of the routing weights reach queries and keys.
    """

    def __init__(
        self,
        qk_dim: int,
        topk: int = 4,
        qk_scale: float | None = None,
        param_routing: bool = False,
        diff_routing: bool = False,
    ) -> None:
        super().__init__()
        self.topk = topk
        self.scale = qk_scale or qk_dim**-0.5
        self.diff_routing = diff_routing
        self.emb = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Routes `(n, P, qk_dim)` region means; returns weight and index (int64), both `(n, P, topk)`."""
        if not self.diff_routing:
            query, key = query.detach(), key.detach()
        return choose_regions(self.emb(query), self.emb(key), self.topk, self.scale)


class QKVLinear(nn.Module):
    """The packed projection: queries, keys and values side by side in the channels."""

    def __init__(self, dim: int, qk_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Projects `(..., dim)` to `(..., 2*qk_dim + dim)`."""
        return self.qkv(x)


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention over an NHWC map, with the arguments and `state_dict` keys of the original.

    Args:
        dim: channels of the map.
        num_heads: attention heads; divides `dim` and `qk_dim`.
        n_win: regions a side, so `P = n_win**2` regions.
        qk_dim: channels of queries and keys; `dim` by default.
        qk_scale: factor of the logits; `qk_dim ** -0.5` by default (of all heads together, on purpose).
        kv_per_win: keys a side of a region, for `kv_downsample_mode` `"ada_avgpool"` and `"ada_maxpool"`.
        kv_downsample_ratio: how much the other modes reduce a side of a region; see `downsampling.build`.
        kv_downsample_kernel: window of `"fracpool"`, kernel of `"conv"`; by default after the ratio.
        kv_downsample_mode: how keys and values are reduced inside each region, one of `downsampling.MODES`.
            The original leaves `"fracpool"` and `"conv"` unimplemented.
        topk: regions that every region attends to.
        param_attention: `"qkvo"` (projection in and out) or `"qkv"` (no output projection).
        param_routing: a linear layer inside the router; demands `diff_routing`.
        diff_routing: let gradients reach queries and keys through the routing weights. Without
            `soft_routing` the forward does not use the weights, and their gradient is straight-through.
        soft_routing: multiply the selected keys and values by the routing weights.
        side_dwconv: kernel size (odd) of the depthwise convolution of the values, LePE; 0 for none.
        auto_pad: zero-pad the map at the bottom and right to multiples of `n_win`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = False,
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        self.spec = AttentionSpec(dim, qk_dim, num_heads, n_win, topk, qk_scale, soft_routing, diff_routing)
        if param_attention not in PARAM_ATTENTION_MODES:
            raise ValueError(
                f"param_attention must be one of {PARAM_ATTENTION_MODES}, got {param_attention!r}"
            )
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True, or router.emb gets no gradient")
        if side_dwconv != 0 and (side_dwconv < 0 or side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv must be 0 or an odd kernel size, got {side_dwconv}")

        self.kv_downsample_mode = kv_downsample_mode
        self.auto_pad = auto_pad
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim) if side_dwconv else None
        )
        self.router = TopkRouting(qk_dim, topk, self.spec.scale, param_routing, diff_routing)
        self.qkv = QKVLinear(dim, qk_dim)
        self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        self.kv_down = downsampling.build(
            kv_downsample_mode, qk_dim, dim, kv_per_win, kv_downsample_ratio, kv_downsample_kernel
        )

    def forward(
        self, x: Tensor, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, H, W, dim)`.
            ret_attn_mask: return the routing and the attention matrix too.

        Returns:
            `(N, H, W, dim)`; with `ret_attn_mask` also `r_weight` and `r_idx` `(N, P, topk)` and
            `attn_weight` `(N*P, num_heads, S, topk*S_kv)`.
        """
        padded = self._pad(x)
        qkv = self.qkv(padded)
        out, r_weight, r_idx, attn_weight = self._attend(qkv)
        out = self._crop(self.wo(out), x)
        return (out, r_weight, r_idx, attn_weight) if ret_attn_mask else out

    def _check_map(self, x: Tensor) -> RegionGrid:
        """Regions of the map; raises ValueError where it cannot be cut and may not be padded."""
        if x.dim() != 4 or x.shape[-1] != self.spec.dim:
            raise ValueError(f"x must be (N, H, W, dim) with dim={self.spec.dim}, got shape {tuple(x.shape)}")
        return RegionGrid.of_windows(x.shape[1], x.shape[2], self.spec.n_win, self.auto_pad)

    def _pad(self, x: Tensor) -> Tensor:
        grid = self._check_map(x)
        # An exported graph serves other sizes too, so it pads even where this size needs no padding.
        if not self.auto_pad or not (being_exported() or grid.is_padded):
            return x
        bottom, right = grid.padding
        return F.pad(x, (0, 0, 0, right, 0, bottom))

    @staticmethod
    def _crop(out: Tensor, x: Tensor) -> Tensor:
        if not being_exported() and out.shape[1:3] == x.shape[1:3]:
            return out
        return out[:, : x.shape[1], : x.shape[2]].contiguous()

    def _attend(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Routing, attention and LePE of a packed projection `(N, H, W, 2*qk_dim + dim)`."""
        r_weight, r_idx = self.router(*region_means(qkv, self.spec))
        factor = routing_factor(r_weight, self.spec)
        out, attn_weight = routed_attention(qkv, r_idx, self.spec, self.kv_down, factor)
        if self.lepe is not None:
            out = out + _lepe(qkv, self.lepe.weight, self.lepe.bias)
        return out, r_weight, r_idx, attn_weight


def attend(
    qkv: Tensor,
    spec: AttentionSpec,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    *,
    padding: Tensor | None = None,
    emb: Callable[[Tensor], Tensor] | None = None,
    kv_down: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Routing, attention and LePE of a packed projection; arguments as for `functional.attend`."""
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    if grid.is_padded:
        qkv = pad_map(qkv, grid, padding)
    r_weight, r_idx = route(qkv, spec, emb)
    out, _ = routed_attention(qkv, r_idx, spec, kv_down, routing_factor(r_weight, spec))
    if lepe_weight is not None:
        out = out + _lepe(qkv, lepe_weight, lepe_bias)
    return out[:, : grid.height, : grid.width]


def route(
    qkv: Tensor, spec: AttentionSpec, emb: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Routing of a packed projection: `r_weight` and `r_idx` (int64), both `(N, P, topk)`."""
    query, key = region_means(qkv if spec.diff_routing else qkv.detach(), spec)
    if emb is not None:
        query, key = emb(query), emb(key)
    return choose_regions(query, key, spec.topk, spec.scale)


def choose_regions(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Routing weights and chosen regions (int64), `(n, r, t)`, of region queries and keys `(n, r, c)`."""
    logits = (query * scale) @ rearrange(key, "n r c -> n c r")
    top_logits, r_idx = select_topk(logits, topk)
    return top_logits.softmax(dim=-1), r_idx


def routing_factor(r_weight: Tensor, spec: AttentionSpec) -> Tensor | None:
    """What the selected keys and values are multiplied by, `(n, r, t)`, or None for nothing."""
    if spec.routing_weight == "soft":
        return r_weight
    if spec.routing_weight == "hard":  # exactly one forward, the gradient of r_weight backward
        return 1 + (r_weight - r_weight.detach())
    return None


def region_means(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Mean query and mean key of every region, both `(N, P, qk_dim)`."""
    query, key, _ = _split_regions(qkv, spec)
    return reduce(query, "n r h w c -> n r c", "mean"), reduce(key, "n r h w c -> n r c", "mean")


def routed_attention(
    qkv: Tensor,
    r_idx: Tensor,
    spec: AttentionSpec,
    kv_down: Callable[[Tensor], Tensor] | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token-to-token attention to the gathered tokens of the routed regions (paper, equation 6).

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`.
        r_idx: `(N, P, topk)`, int64.
        spec: what is computed.
        kv_down: reduces keys and values of a region, `(B, qk_dim + dim, h, w)` to
            `(B, qk_dim + dim, h', w')`.
        factor: `(N, P, topk)`: multiplies the keys and values of each chosen region.

    Returns:
        The output `(N, H, W, dim)` and the attention matrix `(N*P, num_heads, S, topk*S_kv)`.
    """
    query, key, value = _split_regions(qkv, spec)
    key_value = torch.cat((key, value), dim=-1)  # together: they share the samples of fractional pooling
    key_value = gather_regions(_downsample(key_value, kv_down or nn.Identity()), r_idx)
    if factor is not None:
        key_value = key_value * rearrange(factor, "n r t -> n r t 1 1")
    key, value = key_value.split([spec.qk_dim, spec.dim], dim=-1)

    query = rearrange(query, "n r h w (m c) -> (n r) m (h w) c", m=spec.num_heads)
    key = rearrange(key, "n r t s (m c) -> (n r) m c (t s)", m=spec.num_heads)
    value = rearrange(value, "n r t s (m c) -> (n r) m (t s) c", m=spec.num_heads)
    attn_weight = ((query * spec.scale) @ key).softmax(dim=-1)
    out = rearrange(
        attn_weight @ value,
        "(n j i) m (h w) c -> n (j h) (i w) (m c)",
        j=spec.n_win,
        i=spec.n_win,
        h=qkv.shape[1] // spec.n_win,
    )
    return out, attn_weight


def _split_regions(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `(n, r, h, w, c)`."""
    regions = rearrange(qkv, "n (j h) (i w) c -> n (j i) h w c", j=spec.n_win, i=spec.n_win)
    return regions.split([spec.qk_dim, spec.qk_dim, spec.dim], dim=-1)


def _downsample(x: Tensor, kv_down: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduces the tokens of every region: `(n, r, h, w, c)` to `(n, r, s, c)`."""
    batch, n_regions = x.shape[:2]
    x = kv_down(rearrange(x, "n r h w c -> (n r) c h w"))
    return rearrange(x, "(n r) c h w -> n r (h w) c", n=batch, r=n_regions)


def _lepe(qkv: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of the full-resolution values, zero-padded at the map's border."""
    dim = weight.shape[0]
    value = rearrange(qkv[..., -dim:], "n h w c -> n c h w").contiguous()
    lepe = F.conv2d(value, weight, bias, padding=weight.shape[-1] // 2, groups=dim)
    return rearrange(lepe, "n c h w -> n h w c")


def gather_regions(x: Tensor, r_idx: Tensor) -> Tensor:
    """Gathers for every region the tokens of the regions it chose.

    Args:
        x: `(n, r, s, c)`.
        r_idx: `(n, r, t)`, int64.

    Returns:
        `(n, r, t, s, c)`.
    """
    batch = torch.arange(x.shape[0], device=x.device)
    return x[rearrange(batch, "n -> n 1 1"), r_idx]
