"""The functional API: makes a call of the arguments, checks it, and hands it to the backend that serves."""

import math
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor, nn

from . import reference
from .arguments import dense_floats, factor, flag, whole
from .backend.protocol import Backend
from .backend.select import check_name, select
from .call import Call, Known
from .export import is_eager
from .kernels.bounded import MOST_ENTRIES, Bounded
from .modules.downsampling import KVDownsampling, may_be_bypassed
from .regional_call import regional_call
from .spec import AttentionSpec

T = TypeVar("T")
# For each signature that has passed the checks: the numbers, the backend and a place for its plans.
_known: dict[Hashable, Known] = Bounded()


def bi_level_routing_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    n_win: int | tuple[int, int],
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
        n_win: number of regions along each side, or `(rows, columns)`.
        topk: number of regions that every region attends to.
        qk_dim: channels of queries and keys; by default a third of the channels of `qkv`.
        scale: factor of the logits, not 0; `qk_dim ** -0.5` by default. Must be a number, because it gets no
            gradient.
        lepe_weight: `(dim, 1, k, k)`, `k` odd: depthwise convolution of the values added to the output.
        lepe_bias: `(dim,)`; only with `lepe_weight`.
        padding: `(2*qk_dim + dim,)`: query, key and value of each token that is added at the bottom and right
            to make `H` and `W` multiples of `n_win`. These tokens take part in all but the output; the
            Triton kernels never store them. Without `padding`, `H` and `W` must be multiples of `n_win`.
        soft_routing: multiply the chosen keys and values by the routing weights.
        diff_routing: let gradients reach the regions' queries and keys through the routing weights.
        router_weight: `(qk_dim, qk_dim)`: linear layer on region queries and keys; needs `diff_routing`.
        router_bias: `(qk_dim,)`; only with `router_weight`.
        kv_downsampling: module made by `downsampling.build`; reduces keys and values inside each region.
        backend: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.

    Returns:
        `(N, H, W, dim)`, contiguous, of `qkv`'s dtype. No gradient passes through the choice of regions.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.

    Example:
        >>> qkv = torch.randn(2, 20, 20, 3 * 64)
        >>> bi_level_routing_attention(qkv, num_heads=2, n_win=4, topk=4).shape
        torch.Size([2, 20, 20, 64])
    """
    dims = _made(_dims_of, _channels_of(qkv), qk_dim)
    spec = _made(_spec_of, *dims, num_heads, n_win, topk, scale, soft_routing, diff_routing)
    down = None if type(kv_downsampling) is nn.Identity else kv_downsampling
    call = Call(qkv, spec, lepe_weight, lepe_bias, padding, router_weight, router_bias, down)
    if isinstance(down, KVDownsampling) and not may_be_bypassed(down):
        call.calls = "kv_downsampling"
    return attend(call, backend)


def region_routing(
    qkv: Tensor,
    *,
    n_win: int | tuple[int, int],
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
        qkv: as for `bi_level_routing_attention`; so are all other arguments.
        n_win: number of regions along each side, or `(rows, columns)`.
        topk: number of regions to choose for every region; among equal logits the smaller index comes first.
        qk_dim: channels of queries and keys.
        scale: factor of the logits.
        padding: what tokens past the map's edge hold.
        diff_routing: let gradients of the weights reach `qkv`, `padding` and the router.
        router_weight: linear layer on the regions' queries and keys.
        router_bias: its bias.
        backend: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.

    Returns:
        `r_weight`, the softmax over the chosen logits (float32; float64 for float64), and `r_idx` (int64),
        both `(N, P, topk)`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.

    Example:
        >>> r_weight, r_idx = region_routing(torch.randn(2, 20, 20, 3 * 64), n_win=4, topk=3)
        >>> r_weight.shape, r_idx.shape
        (torch.Size([2, 16, 3]), torch.Size([2, 16, 3]))
    """
    dim, qk_dim = _made(_dims_of, _channels_of(qkv), qk_dim)
    # The routing does not depend on the heads. Use as many as possible: every backend takes the narrowest.
    spec = _made(_spec_of, dim, qk_dim, math.gcd(dim, qk_dim), n_win, topk, scale, False, diff_routing)
    call = Call(qkv, spec, padding=padding, router_weight=router_weight, router_bias=router_bias)
    return _backend_of(call, backend).route(call)


def regional_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    region_graph: Tensor,
    region_size: tuple[int, int],
    kv_region_size: tuple[int, int] | None = None,
    auto_pad: bool = True,
    *,
    ret_attn_mask: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention from every query region to the tokens of the key regions that a graph names, per head.

    The signature and the two results are those of `regional_routing_attention_torch` in rayleizhu/BiFormer
    `ops/torch/rrsda.py`. The second result, the attention matrix, is None unless it is asked for, as in
    `nn.MultiheadAttention`: the fused backends never hold this matrix in memory.

    Args:
        query: `(N, C, H, W)`, float32, float16, bfloat16 or float64. Channels-last maps, and channel slices
            of them, are read in place; others are copied once.
        key: `(N, C, H_kv, W_kv)`; the map may differ from the queries' in size and number of regions.
        value: `(N, C_v, H_kv, W_kv)`.
        scale: factor of the logits, not 0. Must be a number, because it gets no gradient.
        region_graph: `(N, num_heads, P, topk)`, int64 or int32, of any strides: key regions that every query
            region attends to, in `[0, P_kv)`; `num_heads` divides `C` and `C_v`. A graph expanded over the
            heads is used as one. On the CPU an entry outside this range is an error. On other devices, where
            the check would wait for the device, and in compiled, exported or vmapped graphs, such an entry
            counts as the nearest region, the first or the last; with `BRA_TRITON_CHECK=1` in the environment
            it is an error on other devices, too.
        region_size: height and width of a query region, in tokens.
        kv_region_size: height and width of a key region; `region_size` by default.
        auto_pad: zero-pad maps at the bottom and right to multiples of the region sizes; padded keys take
            part, with logit 0 and value 0. The Triton kernels need no copy for it.
        ret_attn_mask: whether to return the attention matrix, for inspection; the reference computes it.
        backend: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.

    Returns:
        `(N, C_v, H, W)` in channels-last memory, of `query`'s dtype; and None, or with `ret_attn_mask` the
        attention matrix `(N, num_heads, P, S, topk*S_kv)`.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.

    Example:
        >>> maps, graph = torch.randn(3, 2, 64, 8, 8), torch.zeros(2, 4, 16, 3, dtype=torch.int64)
        >>> out, _ = regional_routing_attention(*maps, 0.125, graph, region_size=(2, 2))
        >>> out.shape
        torch.Size([2, 64, 8, 8])
    """
    call = regional_call(query, key, value, scale, region_graph, region_size, kv_region_size, auto_pad)
    served_by = select(backend, call)
    if flag("ret_attn_mask", ret_attn_mask):
        return reference.attend_regional(call)
    return served_by.attend_regional(call), None


def attend(call: Call, backend: str = "auto") -> Tensor:
    """`bi_level_routing_attention` for a `Call`."""
    return _backend_of(call, backend).attend(call)


def _backend_of(call: Call, name: str) -> Backend:
    """The backend that serves a call; raises if the call is wrong or no backend can serve it.

    A signature that has passed the checks is not checked again: that would cost as much as the launches.
    """
    if not call.eager:
        call.check()
        return select(name, call)
    try:
        signature = (name, call.signature)
        known = _known.get(signature)
    # An argument has a wrong type. The checks raise an error that names the argument.
    except (AttributeError, TypeError):
        check_name(name)
        call.check()
        raise
    if known is None:
        call.check()
        known = _known[signature] = Known(call.settings, select(name, call), Bounded())
    call.known = known
    backend: Backend = known.backend
    return backend


def _channels_of(qkv: Tensor) -> int:
    if dense_floats("qkv", qkv).dim() != 4:
        raise ValueError(f"qkv must be (N, H, W, 2*qk_dim + dim), got shape {tuple(qkv.shape)}")
    return qkv.shape[-1]


def _dims_of(channels: int, qk_dim: int | None) -> tuple[int, int]:
    """Channels of the values, and of the queries and keys."""
    if qk_dim is None:
        if channels % 3:
            raise ValueError(
                f"qk_dim must be given if qkv's channels are not a multiple of 3, got {channels}"
            )
        qk_dim = channels // 3
    qk_dim = whole("qk_dim", qk_dim)
    if not 2 * qk_dim < channels:
        raise ValueError(f"qk_dim must leave channels for the values, 2*qk_dim < {channels}, got {qk_dim}")
    return channels - 2 * qk_dim, qk_dim


def _spec_of(
    dim: int,
    qk_dim: int,
    num_heads: int,
    n_win: int | tuple[int, int],
    topk: int,
    scale: float | None,
    soft_routing: bool,
    diff_routing: bool,
) -> AttentionSpec:
    scale = None if scale is None else factor("scale", scale)  # `AttentionSpec` would call it "qk_scale"
    return AttentionSpec(dim, qk_dim, num_heads, n_win, topk, scale, soft_routing, diff_routing)


def _made(make: Callable[..., T], *arguments: Any) -> T:
    """`make(*arguments)`, computed and checked only once for arguments of the same types and values."""
    if is_eager():
        try:
            return _kept(make, *arguments)
        except TypeError:  # an argument without a hash, such as a list; `make` takes it or raises, below
            pass
    return make(*arguments)


@lru_cache(MOST_ENTRIES, typed=True)  # typed: True equals 1, but is not a valid number of heads
def _kept(make: Callable[..., T], *arguments: Any) -> T:
    return make(*arguments)
