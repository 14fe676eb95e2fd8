"""The drop-in for the authors' NCHW module: its arguments and `state_dict`, on the fused backends."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import nchw_reference, regional
from .backend import registry
from .export import being_exported
from .kernels.region_grid import RegionGrid
from .routing import select_topk

ATTENTION_BACKENDS = ("torch", "triton")


class NCHWBiLevelRoutingAttention(nchw_reference.NCHWBiLevelRoutingAttention):
    """Bi-level routing attention over an NCHW map; see the reference for the arguments' meaning.

    The parameters are the original's, so its weights load with `strict=True`. A map in channels-last memory
    is projected and attended to without a copy; another is copied once, before the projection.

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
        if ret_attn_mask or self.backend == "reference":
            return super().forward(x, ret_attn_mask)
        grid = self.grid(x)
        qkv = self.qkv_linear(x.contiguous(memory_format=torch.channels_last))
        query, key, value = qkv.chunk(3, dim=1)
        r_idx = route(query, key, grid, self._topk(grid))
        out = regional.regional_routing_attention(
            query,
            key,
            value,
            self.spec.scale,
            r_idx[:, None].expand(-1, self.spec.num_heads, -1, -1),
            (grid.region_height, grid.region_width),
            backend=self.backend,
        )
        if self.lepe is not None:
            out = out + self.lepe(value)
        return self.output_linear(out)


nchwBRA = NCHWBiLevelRoutingAttention  # noqa: N816  the original's name


def route(query: Tensor, key: Tensor, grid: RegionGrid, topk: int) -> Tensor:
    """`nchw_reference.route`, in float32 at least: half precision would choose other regions."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_means, key_means = (_region_means(x.detach(), grid, dtype).flatten(2) for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):
        return select_topk(query_means.transpose(1, 2) @ key_means, topk)[1]


def _region_means(x: Tensor, grid: RegionGrid, dtype: torch.dtype) -> Tensor:
    """Means over the tokens of every region, padding left out: `(N, C, H, W)` to `(N, C, rows, columns)`."""
    if being_exported():
        return _sums_with_padding(x, grid, dtype) / _sums_with_padding(
            torch.ones_like(x[:1, :1]), grid, dtype
        )
    return _means_of_runs(_means_of_runs(x, 3, grid.region_width, dtype), 2, grid.region_height, dtype)


def _means_of_runs(x: Tensor, dim: int, length: int, dtype: torch.dtype) -> Tensor:
    """Means over every `length` entries along `dim`, and over the rest, if any. Makes no copy of `x`."""
    whole = x.shape[dim] // length * length
    means = x.narrow(dim, 0, whole).unflatten(dim, (-1, length)).mean(dim + 1, dtype=dtype)
    if whole == x.shape[dim]:
        return means
    rest = x.narrow(dim, whole, x.shape[dim] - whole).mean(dim, keepdim=True, dtype=dtype)
    return torch.cat((means, rest), dim)


def _sums_with_padding(x: Tensor, grid: RegionGrid, dtype: torch.dtype) -> Tensor:
    """Sums over the tokens of every region, by one path for all sizes, since exported graphs serve others."""
    bottom, right = grid.padding
    tokens = rearrange(
        F.pad(x, (0, right, 0, bottom)),
        "n c (j h) (i w) -> n c j h i w",
        h=grid.region_height,
        w=grid.region_width,
    )
    return tokens.sum((3, 5), dtype=dtype)
