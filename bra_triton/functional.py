"""The functional API: argument checks, choice of the backend, and the call."""

import math

from torch import Tensor

from . import reference
from .backend import registry, traced
from .export import being_exported
from .kernels.region_grid import RegionGrid
from .operators import attention as operators
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
    backend: str = "auto",
) -> Tensor:
    """Bi-level routing attention of a packed projection (BiFormer, section 3.2): routing, attention, LePE.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`: queries, keys and values side by side; `H` and `W` multiples of
            `n_win`; float32, float16, bfloat16 or float64, any strides (contiguous costs no copy).
        num_heads: attention heads; divides `qk_dim` and `dim`.
        n_win: regions a side.
        topk: regions that every region attends to.
        qk_dim: channels of queries and keys; a third of `qkv`'s by default.
        scale: factor of the logits; `qk_dim ** -0.5` by default.
        lepe_weight: `(dim, 1, k, k)`, `k` odd: depthwise convolution of the values added to the output.
        lepe_bias: `(dim,)`; only with `lepe_weight`.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Returns:
        `(N, H, W, dim)`, contiguous, of `qkv`'s dtype. Routing is detached: no gradient passes through the
        choice of regions.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.
    """
    spec = _spec_of(qkv, qk_dim, num_heads, n_win, topk, scale)
    return attend(qkv, spec, lepe_weight, lepe_bias, backend=backend)


def region_routing(
    qkv: Tensor,
    *,
    n_win: int,
    topk: int,
    qk_dim: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Region-to-region routing of a packed projection (BiFormer, equations 3 and 4), detached.

    Args:
        qkv: as for `bi_level_routing_attention`.
        n_win: regions a side.
        topk: regions to choose for every region; equal logits by the smaller index first.
        qk_dim: channels of queries and keys; a third of `qkv`'s by default.
        scale: factor of the logits; `qk_dim ** -0.5` by default.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Returns:
        `r_weight`, the softmax over the chosen logits (float32; float64 for float64), and `r_idx` (int64),
        both `(N, P, topk)`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.
    """
    spec = _spec_of(qkv, qk_dim, None, n_win, topk, scale)
    _check_map(qkv, spec)
    name = registry.select(backend, qkv, spec)
    if name == "reference":
        return reference.route(qkv.detach(), spec)
    r_weight, r_idx = _route(qkv.detach().contiguous(), spec, name)
    return r_weight, r_idx.long()


def attend(
    qkv: Tensor,
    spec: AttentionSpec,
    lepe_weight: Tensor | None = None,
    lepe_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`bi_level_routing_attention` of a specification that is at hand."""
    _check_map(qkv, spec)
    _check_lepe(lepe_weight, lepe_bias, spec.dim)
    if lepe_weight is not None:  # under autocast the projection is in half precision, the weights are not
        lepe_weight = lepe_weight.to(qkv.dtype)
        lepe_bias = None if lepe_bias is None else lepe_bias.to(qkv.dtype)
    name = registry.select(backend, qkv, spec)
    if name == "reference":
        return reference.attend(qkv, spec, lepe_weight, lepe_bias)
    if being_exported():
        return traced.attend(qkv, spec, lepe_weight, lepe_bias)
    qkv = qkv.contiguous()
    _, r_idx = _route(qkv.detach(), spec, name)
    out, _, _ = operators.routed_attention(
        qkv, r_idx, lepe_weight, lepe_bias, spec.qk_dim, spec.num_heads, spec.n_win, spec.scale, name
    )
    return out


def _route(qkv: Tensor, spec: AttentionSpec, backend: str) -> tuple[Tensor, Tensor]:
    return operators.region_routing(
        qkv, spec.qk_dim, spec.num_heads, spec.n_win, spec.topk, spec.scale, backend
    )


def _spec_of(
    qkv: Tensor, qk_dim: int | None, num_heads: int | None, n_win: int, topk: int, scale: float | None
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
    return AttentionSpec(dim, qk_dim, num_heads or math.gcd(qk_dim, dim), n_win, topk, scale)


def _check_map(qkv: Tensor, spec: AttentionSpec) -> None:
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must have a floating dtype, got {qkv.dtype}")
    RegionGrid.of_windows(
        qkv.shape[1], qkv.shape[2], spec.n_win, auto_pad=False
    )  # raises where the map cannot be cut


def _check_lepe(weight: Tensor | None, bias: Tensor | None, dim: int) -> None:
    if weight is None:
        if bias is not None:
            raise ValueError("lepe_bias needs lepe_weight, got lepe_weight=None")
        return
    kernel = weight.shape[-1]
    if weight.shape != (dim, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f"lepe_weight must be ({dim}, 1, k, k) with k odd, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"lepe_bias must be ({dim},), got {tuple(bias.shape)}")
