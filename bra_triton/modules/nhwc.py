"""The drop-in module: the original's arguments and `state_dict`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..arguments import flag, is_whole, one_of
from ..backend.select import check_name
from ..call import Call
from ..export import being_exported, is_eager
from ..functional import attend
from ..kernels.grid import RegionGrid
from ..spec import AttentionSpec
from . import downsampling
from .inputs import FixedScale, check_shape, project

PARAM_ATTENTION_MODES = ("qkvo", "qkv")


class QKVLinear(nn.Module):
    """The packed projection: queries, keys and values side by side in the channels."""

    def __init__(self, dim: int, qk_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Projects `(..., dim)` to `(..., 2*qk_dim + dim)`."""
        return self.qkv(x)


class TopkRouting(FixedScale):
    """The router's parameters, under the original's names; routing itself is a backend's.

    Args:
        spec: what is computed.
        param_routing: apply one shared linear layer to queries and keys first.
    """

    def __init__(self, spec: AttentionSpec, param_routing: bool) -> None:
        super().__init__()
        self.spec = spec
        self.emb = nn.Linear(spec.qk_dim, spec.qk_dim) if param_routing else nn.Identity()


class BiLevelRoutingAttention(FixedScale):
    """Bi-level routing attention over an NHWC map (BiFormer, section 3.2).

    Arguments up to `auto_pad` and the keys of the `state_dict` are those of the original module, so that its
    weights load with `strict=True`. The forward runs on a fused backend, which never holds the gathered keys
    and values or the attention matrix.

    Args:
        dim: channels of the map.
        num_heads: attention heads; divides `dim` and `qk_dim`.
        n_win: regions a side, so `P = n_win**2` regions; or `(rows, columns)` of them, for maps that are not
            square.
        qk_dim: channels of queries and keys; `dim` by default.
        qk_scale: factor of the logits, not 0; `qk_dim ** -0.5` by default (of all heads together, on
            purpose). A number, as it gets no gradient.
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
        backend: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        TypeError: for a `qk_scale` that is a tensor, and where `scale` is set: it would get no gradient.

    Example:
        >>> attention = BiLevelRoutingAttention(dim=64, num_heads=2, n_win=8, topk=4, auto_pad=True)
        >>> attention(torch.randn(2, 80, 80, 64)).shape
        torch.Size([2, 80, 80, 64])
    """

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
        self.spec, dim, qk_dim = spec, spec.dim, spec.qk_dim
        one_of("param_attention", param_attention, PARAM_ATTENTION_MODES)
        if flag("param_routing", param_routing) and not spec.diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True, or router.emb gets no gradient")
        self.kv_downsample_mode = kv_downsample_mode
        self.auto_pad = flag("auto_pad", auto_pad)
        self.backend = backend
        self.lepe = depthwise_convolution(dim, side_dwconv)
        self.router = TopkRouting(spec, param_routing)
        self.qkv = QKVLinear(dim, qk_dim)
        self.wo = nn.Linear(dim, dim) if param_attention == "qkvo" else nn.Identity()
        self.kv_down = downsampling.build(
            kv_downsample_mode, qk_dim, dim, kv_per_win, kv_downsample_ratio, kv_downsample_kernel
        )

    @property
    def backend(self) -> str:
        """`"auto"` or a backend's name; setting it raises as the constructor does."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = check_name(name)

    def forward(
        self, x: Tensor, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, H, W, dim)`, float32, float16, bfloat16 or float64, of any strides.
            ret_attn_mask: return routing and attention matrix too; for looking, runs the reference.

        Returns:
            `(N, H, W, dim)`; with `ret_attn_mask` also `r_weight` and `r_idx` `(N, P, topk)` and
            `attn_weight` `(N*P, num_heads, S, topk*S_kv)`.

        Raises:
            ValueError, TypeError: naming the argument, its value and what is allowed.
            RuntimeError: if the backend asked for by name cannot serve; says why.
        """
        check_shape(x, "(N, H, W, dim)", 3, self.spec.dim)
        eager = is_eager()
        if not eager and being_exported():
            return self._export(x, ret_attn_mask)
        call = self._call(project(self.qkv, x), self._padding(x), eager)
        if ret_attn_mask:
            out, *routing_and_scores = reference.attend(call)
            return self.wo(out), *routing_and_scores
        return self.wo(attend(call, self._backend))

    def _call(self, qkv: Tensor, padding: Tensor | None, eager: bool) -> Call:
        """One call, with the parameters that take part in it."""
        modules: dict[str, Any] = (
            self._modules
        )  # looking a module or parameter up as an attribute costs a microsecond
        lepe, kv_down, emb = modules.get("lepe"), modules["kv_down"], modules["router"]._modules["emb"]
        weight = bias = router_weight = router_bias = None
        if lepe is not None:
            parameters = lepe._parameters
            # A parametrised or pruned weight is no parameter, but an attribute like any other.
            is_usual = "weight" in parameters and "bias" in parameters
            weight, bias = (
                (parameters["weight"], parameters["bias"]) if is_usual else (lepe.weight, lepe.bias)
            )
        if type(emb) is not nn.Identity:
            router_weight, router_bias = emb.weight, emb.bias
        if type(kv_down) is nn.Identity:
            kv_down = None
        tensors = (weight, bias, padding, router_weight, router_bias)
        return Call(qkv, self.spec, *tensors, kv_down, None, eager)

    def _padding(self, x: Tensor) -> Tensor | None:
        """What the projection makes of the zero tokens that pad the map, `(2*qk_dim + dim,)`; None without.

        Raises:
            ValueError: if the map needs padding and may not be padded.
        """
        _, height, width, _ = x.shape
        rows, columns = self.spec.windows
        if not height % rows and not width % columns:
            return None
        if not self.auto_pad:
            RegionGrid.of_windows(height, width, self.spec.n_win, auto_pad=False)
        layer = self.qkv.qkv if type(self.qkv) is QKVLinear and not is_hooked(self.qkv) else None
        if type(layer) is nn.Linear and not is_hooked(layer) and layer.bias is not None:
            return layer.bias
        # Whatever else the projection is: an adapter, a quantised layer.
        return self.qkv(torch.zeros(1, self.spec.dim, dtype=x.dtype, device=x.device))[0]

    def _export(self, x: Tensor, ret_attn_mask: bool) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """The forward in an exported graph, where padding is a tensor operation like any other.

        The graph serves other sizes too, so that it pads even where this size needs none.
        """
        grid = RegionGrid.of_windows(x.shape[1], x.shape[2], self.spec.n_win, self.auto_pad)
        padded = x
        if self.auto_pad:
            bottom, right = grid.padding
            padded = F.pad(x, (0, 0, 0, right, 0, bottom))
        call = self._call(project(self.qkv, padded), None, False)
        if ret_attn_mask or self._backend == "reference":
            out, *routing_and_scores = reference.attend(call)
        else:
            out, routing_and_scores = attend(call, self._backend), []
        out = self.wo(out)[:, : x.shape[1], : x.shape[2]].contiguous()
        return (out, *routing_and_scores) if ret_attn_mask else out


def depthwise_convolution(dim: int, side: int) -> nn.Conv2d | None:
    """LePE's layer, with a kernel of `side` x `side`; None for a side of 0.

    Raises:
        ValueError: if the side is no int, even or negative.
    """
    if not is_whole(side, 0) or (side % 2 == 0 and side != 0):
        raise ValueError(f"side_dwconv must be 0 or an odd kernel size, got {side}")
    return nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) if side else None


def is_hooked(module: nn.Module) -> bool:
    """Whether a forward hook expects the module to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
