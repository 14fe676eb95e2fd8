"""The drop-in for the authors' NCHW module: its arguments and `state_dict`, on the fused backends."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, nchw_reference
from .backend import registry
from .export import being_exported
from .operators import routing as operators

ATTENTION_BACKENDS = ("torch", "triton")


class NCHWBiLevelRoutingAttention(nchw_reference.NCHWBiLevelRoutingAttention):
    """Bi-level routing attention over an NCHW map; see the reference for the arguments' meaning.

    The parameters are the original's, so its weights load with `strict=True`. A map in channels-last memory
    is projected and attended to without a copy; another is copied once, before the projection. The
    gradients of the projections' weights are cuDNN's on a GPU, which repeats their bits if
    `torch.backends.cudnn.deterministic`.

    Args:
        dim: channels of the map; the arguments up to `attn_backend` are those of the original, in its order.
        num_heads: see `nchw_reference.NCHWBiLevelRoutingAttention`, as for all that follow to `auto_pad`.
        n_win: regions a side.
        qk_scale: factor of the tokens' logits.
        topk: regions that every region attends to.
        side_dwconv: kernel size of LePE; 0 for none.
        auto_pad: take maps of fewer than `n_win` tokens a side too.
        attn_backend: the original's name for `backend`: `"torch"`, its only value there, or `"triton"`.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        attn_backend: str | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, n_win, qk_scale, topk, side_dwconv, auto_pad)
        if attn_backend is not None:
            if attn_backend not in ATTENTION_BACKENDS:
                raise ValueError(f"attn_backend must be one of {ATTENTION_BACKENDS}, got {attn_backend!r}")
            if backend not in (registry.AUTO, attn_backend):
                raise ValueError(f"attn_backend={attn_backend!r} contradicts backend={backend!r}")
            backend = attn_backend
        self.backend = backend

    @property
    def backend(self) -> str:
        """`"auto"` or a backend's name; setting another raises ValueError."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = registry.check_name(name)

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, dim, H, W)`, float32, float16, bfloat16 or float64, of any strides.
            ret_attn_mask: return the attention matrix too; for looking, runs the reference.

        Returns:
            `(N, dim, H, W)` in channels-last memory; with `ret_attn_mask` also `attn_weight`
            `(N, num_heads, P, S, topk*S)`.
        """
        if ret_attn_mask or self.backend == "reference" or being_exported():
            return super().forward(x, ret_attn_mask)
        spec, grid = self.spec, self.grid(x)
        qkv = _project(self.qkv_linear, x.permute(0, 2, 3, 1)).contiguous()
        backend = registry.select(self.backend, qkv, spec.head_dims, [grid])
        if self._topk(grid) == grid.n_regions:
            r_idx = functional.all_regions(qkv, grid)
        else:
            # Tokens past the edge are left out of the means, but are zeros to the attention, and take part.
            means = operators.region_means(qkv.detach(), None, spec.qk_dim, grid.numbers, backend)
            _, r_idx = operators.route(*means.split(spec.qk_dim, -1), self._topk(grid), 1.0, backend)
        padding = torch.zeros(spec.packed_dim, device=qkv.device) if grid.is_padded else None
        weight, bias = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
        parts = functional.Parts(weight, bias, padding).for_kernels(qkv.dtype)
        out = functional.attend_to_chosen(qkv, None, r_idx, spec, parts, grid, backend)
        return _project(self.output_linear, out).permute(0, 3, 1, 2)


def _project(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer, a 1x1 convolution, on an NHWC map."""
    if torch.compiler.is_compiling() and type(layer) is nn.Conv2d:
        # Beside a convolution Inductor wants the maps kept for the backward, these views, in a layout of its
        # own: it copies them, and where sizes are symbols it fails to sort their strides (PyTorch 2.14).
        return F.linear(x, layer.weight.flatten(1), layer.bias)
    channels_last = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return layer(channels_last).permute(0, 2, 3, 1)


nchwBRA = NCHWBiLevelRoutingAttention  # noqa: N816  the original's name
