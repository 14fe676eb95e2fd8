"""The functional API: argument checks, choice of the backend, and the call."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backend import registry, traced
from .downsampling import KVDownsampling
from .export import being_exported
from .kernels.grid import RegionGrid
from .operators import attention as attention_operators
from .operators import routing as routing_operators
from .regional import regional_routing_attention  # noqa: F401
from .spec import AttentionSpec


def bi_level_routing_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    n_win: int,
    topk: int,
    qk_dim: int | None = None,
    scale: float | None = None,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    padding: Tensor | None = None,
    soft_routing: bool = False,
    diff_routing: bool = False,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    kv_downsampling: KVDownsampling | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bi-level routing attention of a packed projection (BiFormer, section 3.2): routing, attention, LePE.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`: queries, keys and values side by side; float32, float16, bfloat16 or
            float64, any strides (contiguous costs no copy).
        num_heads: attention heads; divides `qk_dim` and `dim`.
        n_win: regions a side.
        topk: regions that every region attends to.
        qk_dim: channels of queries and keys; a third of `qkv`'s by default.
        scale: factor of the logits; `qk_dim ** -0.5` by default.
        lepe_weight: `(dim, 1, k, k)`, `k` odd: depthwise convolution of the values added to the output.
        lepe_bias: `(dim,)`; only with `lepe_weight`.
        padding: `(2*qk_dim + dim,)`: what the tokens hold that make `H` and `W` multiples of `n_win` at the
            bottom and right. They take part in all but the output, and are never stored. Without it `H` and
            `W` must be such multiples.
        soft_routing: multiply the chosen keys and values by the routing weights.
        diff_routing: let gradients reach the regions' queries and keys through the routing weights.
        router_weight: `(qk_dim, qk_dim)`: linear layer on region queries and keys; needs `diff_routing`.
        router_bias: `(qk_dim,)`; only with `router_weight`.
        kv_downsampling: reduces keys and values inside each region, see `downsampling.build`.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Returns:
        `(N, H, W, dim)`, contiguous, of `qkv`'s dtype. No gradient passes through the choice of regions.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.
    """
    spec = _spec_of(qkv, qk_dim, num_heads, n_win, topk, scale, soft_routing, diff_routing)
    parts = Parts(lepe_weight, lepe_bias, padding, router_weight, router_bias, kv_downsampling)
    return attend(qkv, spec, parts, backend=backend)


def region_routing(
    qkv: Tensor,
    *,
    n_win: int,
    topk: int,
    qk_dim: int | None = None,
    scale: float | None = None,
    padding: Tensor | None = None,
    diff_routing: bool = False,
    router_weight: Tensor | None = None,
    router_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Region-to-region routing of a packed projection (BiFormer, equations 3 and 4).

    Args:
        qkv: as for `bi_level_routing_attention`, as are all that follow.
        n_win: regions a side.
        topk: regions to choose for every region; equal logits by the smaller index first.
        qk_dim: channels of queries and keys.
        scale: factor of the logits.
        padding: what tokens past the map's edge hold.
        diff_routing: let gradients of the weights reach `qkv`, `padding` and the router.
        router_weight: linear layer on the regions' queries and keys.
        router_bias: its bias.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Returns:
        `r_weight`, the softmax over the chosen logits (float32; float64 for float64), and `r_idx` (int64),
        both `(N, P, topk)`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.
    """
    spec = _spec_of(qkv, qk_dim, None, n_win, topk, scale, False, diff_routing)
    parts = Parts(padding=padding, router_weight=router_weight, router_bias=router_bias)
    parts.check(qkv, spec)
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    name = registry.select(backend, qkv, spec.head_dims, [grid])
    if name == "reference":
        padded = reference.pad_map(qkv, grid, padding) if grid.is_padded else qkv
        return reference.route(padded, spec, parts.emb)
    r_weight, r_idx = _route(qkv.contiguous(), spec, parts.for_kernels(qkv.dtype), grid, name)
    return r_weight, r_idx.long()


@dataclass(frozen=True)
class Parts:
    """What an attention may have besides its projection; see `bi_level_routing_attention`."""

    lepe_weight: Tensor | None = None
    lepe_bias: Tensor | None = None
    padding: Tensor | None = None
    router_weight: Tensor | None = None
    router_bias: Tensor | None = None
    kv_downsampling: KVDownsampling | None = None

    def emb(self, means: Tensor) -> Tensor:
        """The router's linear layer, in the precision of the means."""
        if self.router_weight is None:
            return means
        bias = None if self.router_bias is None else self.router_bias.to(means.dtype)
        with torch.autocast(means.device.type, enabled=False):
            return F.linear(means, self.router_weight.to(means.dtype), bias)

    def for_kernels(self, dtype: torch.dtype) -> "Parts":
        """With LePE and padding contiguous and in the projection's dtype: under autocast theirs are wider."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype).contiguous()

        return Parts(
            *(cast(self.lepe_weight), cast(self.lepe_bias), cast(self.padding)),
            *(self.router_weight, self.router_bias, self.kv_downsampling),
        )

    def check(self, qkv: Tensor, spec: AttentionSpec) -> None:
        """Raises ValueError where the parts and a projection do not fit; names the argument."""
        if not qkv.is_floating_point():
            raise ValueError(f"qkv must have a floating dtype, got {qkv.dtype}")
        # Raises where the map cannot be cut and may not be padded.
        RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win, auto_pad=self.padding is not None)
        _check_shape("padding", self.padding, (spec.packed_dim,))
        _check_shape("router_weight", self.router_weight, (spec.qk_dim, spec.qk_dim))
        _check_shape("router_bias", self.router_bias, (spec.qk_dim,))
        _check_lepe(self.lepe_weight, self.lepe_bias, spec.dim)
        if self.router_weight is not None and not spec.diff_routing:
            raise ValueError("router_weight needs diff_routing=True, or it gets no gradient")
        if self.router_weight is None and self.router_bias is not None:
            raise ValueError("router_bias needs router_weight, got router_weight=None")
        down = self.kv_downsampling
        if down is not None and (down.qk_dim, down.dim) != (spec.qk_dim, spec.dim):
            raise ValueError(
                f"kv_downsampling must be for qk_dim={spec.qk_dim} and dim={spec.dim}, got {down.qk_dim} and "
                f"{down.dim}"
            )


def attend(qkv: Tensor, spec: AttentionSpec, parts: Parts | None = None, *, backend: str = "auto") -> Tensor:
    """`bi_level_routing_attention` of a specification that is at hand."""
    parts = parts or Parts()
    parts.check(qkv, spec)
    parts = parts.for_kernels(qkv.dtype)
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    name = registry.select(backend, qkv, spec.head_dims, [grid])
    if name == "reference" or being_exported():
        plain: Callable[..., Tensor] = reference.attend if name == "reference" else traced.attend
        return plain(
            qkv,
            spec,
            parts.lepe_weight,
            parts.lepe_bias,
            padding=parts.padding,
            emb=parts.emb,
            kv_down=parts.kv_downsampling,
        )
    qkv = qkv.contiguous()
    if spec.chooses_all:
        return attend_to_chosen(qkv, None, all_regions(qkv, grid), spec, parts, grid, name)
    r_weight, r_idx = _route(qkv, spec, parts, grid, name)
    return attend_to_chosen(qkv, r_weight, r_idx, spec, parts, grid, name)


def all_regions(qkv: Tensor, grid: RegionGrid) -> Tensor:
    """The choice `(N, P, P)` where there is none: every region attends to all, in whatever order.

    BiFormer's last stage is such: on an H200 routing took 96 us there, the attention 14 to 17.
    """
    regions = torch.arange(grid.n_regions, dtype=torch.int32, device=qkv.device)
    return regions.expand(qkv.shape[0], grid.n_regions, grid.n_regions)


def attend_to_chosen(
    qkv: Tensor,
    r_weight: Tensor | None,
    r_idx: Tensor,
    spec: AttentionSpec,
    parts: Parts,
    grid: RegionGrid,
    backend: str,
) -> Tensor:
    """Attention to chosen regions and LePE on a fused backend.

    `r_weight` is None where the specification makes no use of it, `r_idx` int32, and contiguous unless it is
    `all_regions`.
    """
    padding = parts.padding if grid.is_padded else None
    kv = None
    if parts.kv_downsampling is not None:
        kv = parts.kv_downsampling.pool(qkv, grid, padding, backend=backend)
    factor = None if spec.routing_weight == "none" else r_weight
    tensors = (qkv, kv, padding, r_idx, factor, parts.lepe_weight, parts.lepe_bias)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    numbers = (spec.qk_dim, spec.num_heads, grid.numbers, spec.scale, spec.routing_weight)
    return attention_operators.routed_attention(*tensors, *numbers, trains, backend)[0]


def _route(
    qkv: Tensor, spec: AttentionSpec, parts: Parts, grid: RegionGrid, backend: str
) -> tuple[Tensor, Tensor]:
    """Routing weights and, int32, the chosen regions."""
    padding = parts.padding if grid.is_padded else None
    if not spec.diff_routing:
        qkv, padding = qkv.detach(), None if padding is None else padding.detach()
    means = routing_operators.region_means(qkv, padding, spec.qk_dim, grid.numbers, backend)
    query, key = means.split(spec.qk_dim, dim=-1)
    return routing_operators.route(parts.emb(query), parts.emb(key), spec.topk, spec.scale, backend)


def _spec_of(
    qkv: Tensor,
    qk_dim: int | None,
    num_heads: int | None,
    n_win: int,
    topk: int,
    scale: float | None,
    soft_routing: bool,
    diff_routing: bool,
) -> AttentionSpec:
    """The specification that the arguments amount to; without heads (None) the narrowest there can be."""
    if qkv.dim() != 4:
        raise ValueError(f"qkv must be (N, H, W, 2*qk_dim + dim), got shape {tuple(qkv.shape)}")
    channels = qkv.shape[-1]
    if qk_dim is None:
        if channels % 3:
            raise ValueError(
                f"qk_dim must be given where qkv's channels are no multiple of 3, got {channels}"
            )
        qk_dim = channels // 3
    if not 0 < 2 * qk_dim < channels:
        raise ValueError(f"qk_dim must leave channels for the values, 2*qk_dim < {channels}, got {qk_dim}")
    dim = channels - 2 * qk_dim
    num_heads = num_heads or math.gcd(qk_dim, dim)
    return AttentionSpec(dim, qk_dim, num_heads, n_win, topk, scale, soft_routing, diff_routing)


def _check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def _check_lepe(weight: Tensor | None, bias: Tensor | None, dim: int) -> None:
    if weight is None:
        if bias is not None:
            raise ValueError("lepe_bias needs lepe_weight, got lepe_weight=None")
        return
    kernel = weight.shape[-1]
    if weight.shape != (dim, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f"lepe_weight must be ({dim}, 1, k, k) with k odd, got {tuple(weight.shape)}")
    _check_shape("lepe_bias", bias, (dim,))
