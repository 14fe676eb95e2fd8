"""The drop-in for the authors' NCHW module, with the same arguments and `state_dict` keys."""

from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import reference
from ..arguments import flag, one_of
from ..backend.select import AUTO
from ..call import Call
from ..export import is_eager
from ..functional import attend
from ..kernels.grid import RegionGrid
from ..operators.linear import convolved, is_convolved
from ..spec import AttentionSpec
from .base import FIXED_BY_PARAMETERS, NEVER_CALLED, Attention
from .inputs import apply, check_shape, project
from .layers import depthwise_convolution, is_plain_convolution, lepe_parameters

ATTENTION_BACKENDS = ("torch", "triton")

# A module cuts the same sizes of maps in call after call.
_known_grid = lru_cache(1024)(RegionGrid.of_nchw)


class NCHWBiLevelRoutingAttention(Attention):
    """Bi-level routing attention over an NCHW map, after rayleizhu/BiFormer `ops/bra_nchw.py`.

    It differs from `BiLevelRoutingAttention` in four points:

    - 1x1 convolutions project.
    - A region is `H // n_win` by `W // n_win` tokens large. If a division leaves a remainder, there are more
      than `n_win` regions along that side, and the last ones are padded. As in the original, `auto_pad` does
      not switch this padding on or off.
    - The router's logits are not scaled, and the regions' means leave padding out.
    - Queries, keys and values are zero-padded *after* the projection: a padded key has logit 0 and value 0.

    The parameters are the original's, so its weights load with `strict=True`. A map in channels-last memory
    is projected and attended to without a copy; any other map is copied once, in the projection.

    Args:
        dim: channels of the map.
        num_heads: attention heads; divides `dim`.
        n_win: regions along each side of the map, if it divides the side; or two numbers, `(rows, columns)`.
        qk_scale: factor of the tokens' logits, not 0; by default `dim ** -0.5`, as in the original: `dim`
            counts the channels of all heads together. It must be a number, because it gets no gradient.
        topk: regions that every region attends to, 1 to `n_win**2`.
        side_dwconv: kernel size (odd) of the depthwise convolution of the values, LePE; 0 for none.
        auto_pad: also take maps with fewer than `n_win` tokens along a side, which the original does not
            take. Regions are then one token high or wide; if there are fewer than `topk` regions, every
            region attends to all of them.
        attn_backend: the original's name for `backend`: `"torch"`, its only value there, or `"triton"`.
        backend: `"auto"`, or a name of `bra_triton.backend.select.BACKENDS`.

    Attributes have the original's names; those that `base.Attention` lists can be set, except `soft_routing`
    and `diff_routing`. A layer can be replaced, wrapped or hooked; the module then calls it.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        TypeError: for a `qk_scale` that is a tensor: it would get no gradient.

    Example:
        >>> attention = NCHWBiLevelRoutingAttention(dim=64, num_heads=2, n_win=8)
        >>> attention(torch.randn(2, 64, 80, 80)).shape
        torch.Size([2, 64, 80, 80])
    """

    _fixed: ClassVar[dict[str, str]] = {
        **Attention._fixed,
        "head_dim": FIXED_BY_PARAMETERS,
        "attn_fn": NEVER_CALLED,
        "attn_backend": "set backend, which chooses among this package's backends",
        **dict.fromkeys(("soft_routing", "diff_routing"), "this form has no routing weights"),
    }

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | tuple[int, int] = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        attn_backend: str | None = None,
        *,
        backend: str = AUTO,
    ) -> None:
        super().__init__()
        self.spec = AttentionSpec(
            dim, dim, num_heads, n_win, topk, qk_scale, router_scale=1.0, counts_padding=False
        )
        if attn_backend is not None:
            one_of("attn_backend", attn_backend, ATTENTION_BACKENDS)
            if backend not in (AUTO, attn_backend):
                raise ValueError(f"attn_backend={attn_backend!r} contradicts backend={backend!r}")
            backend = attn_backend
        self.auto_pad = auto_pad
        self.backend = backend
        dim = self.spec.dim
        self.lepe = depthwise_convolution(dim, side_dwconv)
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.spec.head_dims[1]

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, dim, H, W)`, float32, float16, bfloat16 or float64, of any strides.
            ret_attn_mask: also return the attention matrix, for inspection; the reference then computes both.

        Returns:
            `(N, dim, H, W)` in channels-last memory; with `ret_attn_mask` also `attn_weight`
            `(N, num_heads, P, S, topk*S)`.

        Raises:
            ValueError, TypeError: naming the argument, its value and what is allowed.
            RuntimeError: if `backend` names a backend that cannot compute this call; says why.
        """
        if not isinstance(x, Tensor):
            return self._leaf(x, ret_attn_mask)
        if ret_attn_mask is not False and is_eager():
            ret_attn_mask = flag("ret_attn_mask", ret_attn_mask)
        call = self.call_of(x)
        if ret_attn_mask:
            out, _, _, attn_weight = reference.attend(call)
            attn_weight = rearrange(attn_weight, "(n r) m s t -> n m r s t", n=x.shape[0])
            return self._out(out, call), attn_weight
        return self._out(attend(call, self._backend), call)

    def call_of(self, x: Tensor) -> Call:
        """The `Call` that `forward` hands to a backend; raises the same errors as `forward`."""
        grid = self.grid(x)
        qkv = project("qkv_linear", self._modules["qkv_linear"], x.permute(0, 2, 3, 1), _project)
        # The regions' means leave out tokens past the map's edge. In the attention they take part, as zeros.
        padding = qkv.new_zeros(qkv.shape[-1]) if grid.is_padded else None
        weight, bias = lepe_parameters(self._modules.get("lepe"), self.spec.dim)
        return Call(qkv, self.spec, weight, bias, padding, given_grid=grid)

    def grid(self, x: Tensor) -> RegionGrid:
        """The regions of a map `(N, dim, H, W)`; raises ValueError if it cannot be cut into regions."""
        check_shape(x, "(N, dim, H, W)", 1, self.spec.dim)
        cut = _known_grid if is_eager() else RegionGrid.of_nchw
        return cut(x.shape[2], x.shape[3], self.spec.windows, self.auto_pad)

    def _out(self, out: Tensor, call: Call) -> Tensor:
        if call.lepe_weight is None:
            out = self._with_lepe(out, call)
        out = apply("output_linear", self._modules["output_linear"], out, _project)
        return out.permute(0, 3, 1, 2)


def _project(layer: Any, x: Tensor) -> Tensor:
    """Applies a layer, normally a 1x1 convolution, to an NHWC map; returns an NHWC map."""
    if is_plain_convolution(layer, 1) and layer.kernel_size == (1, 1):
        # A matrix product gives the same numbers, and its gradients have the same bits in every run. With a
        # convolution, Inductor copies the maps that are kept for the backward (PyTorch 2.14).
        weight, bias = layer.weight.flatten(1), layer.bias
        if is_convolved(x, weight, bias):
            return convolved(x, weight, bias)
        return F.linear(x, weight, bias)
    channels_last = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return layer(channels_last).permute(0, 2, 3, 1)


nchwBRA = NCHWBiLevelRoutingAttention  # noqa: N816  the original's name
