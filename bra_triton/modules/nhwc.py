"""The drop-in module for NHWC maps, with the original's arguments and `state_dict` keys."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import reference
from ..arguments import flag, one_of
from ..call import Call, in_dtype_of
from ..export import is_eager
from ..functional import attend
from ..kernels.grid import RegionGrid, is_sure
from ..operators.linear import convolved, is_convolved
from ..spec import AttentionSpec
from . import downsampling
from .base import FIXED_BY_PARAMETERS, NEVER_CALLED, Attention, Specified, number
from .inputs import apply, check_shape, for_keeping, project
from .layers import depthwise_convolution, is_plain, lepe_parameters, plain_parameters

PARAM_ATTENTION_MODES = ("qkvo", "qkv")


def without_effect(attention: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each argument of `attention` that its `kv_downsample_mode` does not use.

    A default may be given beside a mode, because it may only keep the place of arguments by position.

    Args:
        attention: arguments of `BiLevelRoutingAttention` by name.
    """
    mode = attention.get("kv_downsample_mode")
    for name, modes in downsampling.USED_BY.items():
        default = inspect.signature(BiLevelRoutingAttention).parameters[name].default
        if name in attention and mode not in modes and (mode is None or attention[name] != default):
            yield (
                f"{name}={attention[name]!r} has no effect without kv_downsample_mode: "
                f"{', '.join(modes[:-1])} or {modes[-1]}"
            )


class QKVLinear(nn.Module):
    """The packed projection: queries, keys and values side by side in the channels."""

    def __init__(self, dim: int, qk_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Projects `(..., dim)` to `(..., 2*qk_dim + dim)`."""
        return self.qkv(x)


class TopkRouting(Specified):
    """The router: holds the parameters and numbers of the original's router under the same names.

    The fused backends choose regions themselves and do not call this module. If it has a hook, the reference
    computes the call, because the reference calls the router.

    Args:
        spec: the numbers that define the attention.
        param_routing: first apply a linear layer, the same one, to region queries and to region keys.
    """

    _fixed: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("spec", "topk", "qk_dim", "scale", "diff_routing"), "set it on the attention"),
        "routing_act": NEVER_CALLED,
    }

    def __init__(self, spec: AttentionSpec, param_routing: bool) -> None:
        super().__init__()
        vars(self)["spec"] = spec  # not by assignment, which `__setattr__` refuses
        self.emb = nn.Linear(spec.qk_dim, spec.qk_dim) if param_routing else nn.Identity()

    qk_dim, topk, diff_routing = number("qk_dim"), number("topk"), number("diff_routing")
    scale = number("routing_scale")

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses regions.

        Args:
            query: `(N, P, qk_dim)` region queries.
            key: `(N, P, qk_dim)` region keys.

        Returns:
            `r_weight`, the softmax over the chosen logits, and `r_idx` (int64), both `(N, P, topk)`.
        """
        if not self.diff_routing:
            query, key = query.detach(), key.detach()
        query, key = (in_dtype_of(self.emb, x).to(x.dtype) for x in (query, key))
        return reference.choose_regions(query, key, self.topk, self.scale)


class BiLevelRoutingAttention(Attention):
    """Bi-level routing attention over an NHWC map (BiFormer, section 3.2).

    Arguments up to `auto_pad` and the keys of the `state_dict` are those of the original module, so that its
    weights load with `strict=True`. The forward runs on a fused backend, which never holds the gathered keys
    and values or the attention matrix.

    Args:
        dim: channels of the map.
        num_heads: attention heads; divides `dim` and `qk_dim`.
        n_win: regions along each side of the map, so `P = n_win**2`; or two numbers, `(rows, columns)`, for
            maps that are not square.
        qk_dim: channels of queries and keys; `dim` by default.
        qk_scale: factor of the logits, not 0; by default `qk_dim ** -0.5`, as in the original: `qk_dim`
            counts the channels of all heads together. It must be a number, because it gets no gradient.
        kv_per_win: keys along each side of a region, for `kv_downsample_mode` `"ada_avgpool"` and
            `"ada_maxpool"`.
        kv_downsample_ratio: how much the other modes reduce a side of a region; see `downsampling.build`.
        kv_downsample_kernel: window of `"fracpool"`, kernel of `"conv"`; by default set by the ratio.
        kv_downsample_mode: how keys and values are reduced inside each region, one of `downsampling.MODES`.
            The original leaves `"fracpool"` and `"conv"` unimplemented. A mode ignores the arguments of the
            others, because callers of the original give all of them.
        topk: regions that every region attends to.
        param_attention: `"qkvo"` (projection in and out) or `"qkv"` (no output projection).
        param_routing: a linear layer inside the router; demands `diff_routing`.
        diff_routing: let gradients reach queries and keys through the routing weights. Without
            `soft_routing` the forward does not use the weights, and their gradient is straight-through.
        soft_routing: multiply the selected keys and values by the routing weights.
        side_dwconv: kernel size (odd) of the depthwise convolution of the values, LePE; 0 for none.
        auto_pad: zero-pad the map at the bottom and right to multiples of `n_win`.
        backend: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.

    Attributes have the original's names; `base.Attention` lists those that can be set. Layers can be
    replaced, wrapped or hooked. Every backend then calls such a `qkv`, `wo`, `lepe` or `router.emb`. Only the
    reference calls such a `router` or `kv_down`; it then computes the call, whatever `backend` is.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        TypeError: for a `qk_scale` that is a tensor: it would get no gradient.

    Example:
        >>> attention = BiLevelRoutingAttention(dim=64, num_heads=2, n_win=8, topk=4, auto_pad=True)
        >>> attention(torch.randn(2, 80, 80, 64)).shape
        torch.Size([2, 80, 80, 64])
    """

    _fixed: ClassVar[dict[str, str]] = {
        **Attention._fixed,
        **dict.fromkeys(("qk_dim", "param_attention", "param_routing"), FIXED_BY_PARAMETERS),
        **dict.fromkeys(
            (
                "kv_downsample_mode",
                "kv_per_win",
                "kv_downsample_ratio",
                "kv_downsample_kernel",
                "kv_downsample_kenel",
            ),
            "kv_down holds this setting; replace kv_down by the result of downsampling.build(...)",
        ),
        "kv_gather": NEVER_CALLED,
    }

    qk_dim = number("qk_dim")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | tuple[int, int] = 7,
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
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        qk_dim = dim if qk_dim is None else qk_dim
        spec = AttentionSpec(dim, qk_dim, num_heads, n_win, topk, qk_scale, soft_routing, diff_routing)
        one_of("param_attention", param_attention, PARAM_ATTENTION_MODES)
        self.spec, dim, qk_dim = spec, spec.dim, spec.qk_dim
        self.auto_pad = auto_pad
        self.backend = backend
        vars(self).update(  # not by assignment, which `__setattr__` refuses
            param_attention=param_attention,
            param_routing=flag("param_routing", param_routing),
            kv_downsample_mode=kv_downsample_mode,
            kv_per_win=kv_per_win,
            kv_downsample_ratio=kv_downsample_ratio,
            kv_downsample_kernel=kv_downsample_kernel,
            kv_downsample_kenel=kv_downsample_kernel,  # the original's spelling
        )
        self._check_spec(spec)
        self.lepe = depthwise_convolution(dim, side_dwconv)
        self.router = TopkRouting(spec, param_routing)
        self.qkv = QKVLinear(dim, qk_dim)
        self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        self.kv_down = downsampling.build(
            kv_downsample_mode, qk_dim, dim, kv_per_win, kv_downsample_ratio, kv_downsample_kernel
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "spec":
            router = self._modules.get("router")
            if isinstance(router, TopkRouting):
                vars(router)["spec"] = value

    def _check_spec(self, spec: AttentionSpec) -> None:
        super()._check_spec(spec)
        if vars(self).get("param_routing") and not spec.diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True, or router.emb gets no gradient")

    def forward(
        self, x: Tensor, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, H, W, dim)`, float32, float16, bfloat16 or float64, of any strides.
            ret_attn_mask: also return routing and attention matrix, for inspection; the reference then
                computes all of them.

        Returns:
            `(N, H, W, dim)`; with `ret_attn_mask` also `r_weight` and `r_idx` `(N, P, topk)` and
            `attn_weight` `(N*P, num_heads, S, topk*S_kv)`.

        Raises:
            ValueError, TypeError: naming the argument, its value and what is allowed.
            RuntimeError: if `backend` names a backend that cannot compute this call; says why.
        """
        if not isinstance(x, Tensor):
            return self._leaf(x, ret_attn_mask)
        if ret_attn_mask is not False and is_eager():
            ret_attn_mask = flag("ret_attn_mask", ret_attn_mask)
        x = self._map_of(x)
        check_shape(x, "(N, H, W, dim)", 3, self.spec.dim)
        given, padding, grid = self._padded(x)
        # `x += attention(x)` must work in training, as it does with the original, which projects a copy of x.
        kept = for_keeping(x, self._modules["qkv"]) if given is x else given
        call = self._call(self._project(kept), padding, grid)
        if ret_attn_mask:
            scored = reference.attend(call)
            return self._out(scored.out, call, x), *scored[1:]
        return self._out(attend(call, self._backend), call, x)

    def grid(self, x: Tensor) -> RegionGrid:
        """The regions of a map, as `forward` takes it; raises ValueError if it cannot be cut into regions."""
        x = self._map_of(x)
        return RegionGrid.of_windows(x.shape[1], x.shape[2], self.spec.n_win, self.auto_pad)

    def _map_of(self, x: Tensor) -> Tensor:
        """What the forward takes as `(N, H, W, dim)`."""
        return x

    def _of_map(self, out: Tensor) -> Tensor:
        """`(N, H, W, dim)` as the forward returns it."""
        return out

    def _project(self, x: Tensor) -> Tensor:
        # `self.qkv` would take a microsecond longer than the look-up.
        qkv = project("qkv", self._modules["qkv"], x, self._call_linear)
        # The original's projection returns two tensors: queries, and keys and values side by side.
        return torch.cat(qkv, dim=-1) if isinstance(qkv, tuple) else qkv

    def _out(self, out: Tensor, call: Call, x: Tensor) -> Tensor:
        if call.lepe_weight is None:
            out = self._with_lepe(out, call)
        if call.given_grid is not None:  # `_padded` has padded the map
            out = out[:, : x.shape[1], : x.shape[2]]
        return self._of_map(apply("wo", self._modules["wo"], out, self._call_linear))

    def _call_linear(self, layer: Any, x: Tensor) -> Any:
        """Calls a layer that projects a map, or computes the same faster.

        For the reference the layer is always called, as in the original.
        """
        if x.device.type != "cpu" or self._backend == "reference":
            return layer(x)  # without the checks below, which take a microsecond
        linear = layer._modules["qkv"] if is_plain(layer, QKVLinear) else layer
        if is_plain(linear, nn.Linear) and not _has_any_global_hook():
            weight, bias = plain_parameters(linear)
            if weight is not None and is_convolved(x, weight, bias):
                return convolved(x, weight, bias)
        return layer(x)

    def call_of(self, x: Tensor) -> Call:
        """The `Call` of a map, for tools that inspect it; its padding is never a part of the map itself.

        `forward` hands the same call to a backend, unless it pads the map (`_padded`).
        """
        x = self._map_of(x)
        check_shape(x, "(N, H, W, dim)", 3, self.spec.dim)
        given, padding, _ = self._padded(x)
        qkv = self._project(given)
        if given is not x:
            qkv, padding = qkv[:, : x.shape[1], : x.shape[2]], self._zero_token(x)
        return self._call(qkv, padding)

    def _call(self, qkv: Tensor, padding: Tensor | None, grid: RegionGrid | None = None) -> Call:
        """Makes a `Call`. It holds a layer's parameters or, if the layer must be called, the layer itself."""
        modules: dict[str, Any] = self._modules
        router, kv_down = modules["router"], modules["kv_down"]
        weight, bias = lepe_parameters(modules.get("lepe"), self.spec.dim)
        call = Call(qkv, self.spec, weight, bias, padding, given_grid=grid)
        if not is_plain(router, TopkRouting):
            call.router, call.calls = self._route, "router"
        elif not is_plain(emb := router._modules["emb"], nn.Identity):
            if is_plain(emb, nn.Linear):
                call.router_weight, call.router_bias = plain_parameters(emb)
            elif self.spec.diff_routing or not any(x.requires_grad for x in emb.parameters()):
                call.router_layer = emb
            else:
                raise ValueError("router.emb needs diff_routing=True, or its parameters get no gradient")
        if not is_plain(kv_down, nn.Identity):
            call.kv_downsampling = kv_down
            if not downsampling.may_be_bypassed(kv_down):
                call.calls = f"{call.calls} and kv_down".removeprefix(" and ")
        return call

    def _route(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Calls the router on region queries and keys; returns `r_weight` and `r_idx` (int64)."""
        if isinstance(self.router, TopkRouting):  # it keeps the precision of the region queries and keys
            return self.router(query, key)
        r_weight, r_idx = in_dtype_of(self.router, query, key)
        return r_weight, r_idx.long()

    def _padded(self, x: Tensor) -> tuple[Tensor, Tensor | None, RegionGrid | None]:
        """What to project for a map `(N, H, W, dim)`, and how it is padded.

        If the projection is a plain linear layer, its bias is what padding tokens hold, and no map is padded.
        Any other projection, such as an adapter or a hooked layer, is called on the padded map, as in the
        original: only once, so that a hook sees one call, and a layer that changes in every call (spectral
        norm) is the same for all tokens. A recorded graph calls it on a zero token instead, because the graph
        must serve sizes that need padding and sizes that do not.

        Returns:
            `x` or the padded map; the packed row `(2*qk_dim + dim,)` of padding tokens outside of this map,
            or None; and the regions of the map, if it was padded.

        Raises:
            ValueError: if the map needs padding and `auto_pad` is False.
        """
        _, height, width, _ = x.shape
        rows, columns = self.spec.windows
        if is_sure(height % rows == 0) and is_sure(width % columns == 0):
            return x, None, None
        if not self.auto_pad:
            RegionGrid.of_windows(height, width, self.spec.n_win, auto_pad=False)
            return x, None, None
        layer: Any = self.qkv.qkv if is_plain(self.qkv, QKVLinear) else None
        if is_plain(layer, nn.Linear):
            return x, x.new_zeros(self.spec.packed_dim) if layer.bias is None else layer.bias, None
        if not is_eager():
            return x, self._zero_token(x), None
        grid = RegionGrid.of_windows(height, width, self.spec.n_win)
        bottom, right = grid.padding
        whole = replace(grid, height=height + bottom, width=width + right)
        return F.pad(x, (0, 0, 0, right, 0, bottom)), None, whole

    def _zero_token(self, x: Tensor) -> Tensor:
        """What the projection makes of a zero token, `(2*qk_dim + dim,)`."""
        return self._project(x.new_zeros(1, 1, 1, self.spec.dim))[0, 0, 0]
