"""The drop-in module: the original's arguments and `state_dict`, on the fused backends."""

import torch
from torch import Tensor, nn

from . import functional, reference
from .backend import registry
from .export import being_exported


class BiLevelRoutingAttention(reference.BiLevelRoutingAttention):
    """Bi-level routing attention over an NHWC map; see the reference for the arguments' meaning.

    The parameters are the reference's, so weights of the original load with `strict=True`. The forward runs
    on a fused backend that never holds the gathered keys and values or the attention matrix.

    Args:
        dim: channels of the map; the arguments up to `auto_pad` are those of the original, in its order.
        num_heads: see `reference.BiLevelRoutingAttention`, as for all that follow but `backend`.
        n_win: regions a side.
        qk_dim: channels of queries and keys.
        qk_scale: factor of the logits.
        kv_per_win: keys a side of a region, for adaptive pooling.
        kv_downsample_ratio: window and stride of plain pooling.
        kv_downsample_kernel: kernel size of convolutional down-sampling.
        kv_downsample_mode: how keys and values are reduced inside each region.
        topk: regions that every region attends to.
        param_attention: `"qkvo"` or `"qkv"`.
        param_routing: a linear layer inside the router; demands `diff_routing`.
        diff_routing: gradients reach queries and keys through the routing weights.
        soft_routing: the selected keys and values are multiplied by the routing weights.
        side_dwconv: kernel size of LePE; 0 for none.
        auto_pad: zero-pad the map to multiples of `n_win`.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

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
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            n_win,
            qk_dim,
            qk_scale,
            kv_per_win,
            kv_downsample_ratio,
            kv_downsample_kernel,
            kv_downsample_mode,
            topk,
            param_attention,
            param_routing,
            diff_routing,
            soft_routing,
            side_dwconv,
            auto_pad,
        )
        self.backend = backend

    @property
    def backend(self) -> str:
        """`"auto"` or a backend's name; setting it raises as the constructor does."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = registry.check_name(name)

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
        """
        if ret_attn_mask or self.backend == "reference":
            return super().forward(x, ret_attn_mask)
        grid, padding = self._check_map(x), None
        if being_exported():  # in the exported graph, padding is a tensor operation like any other
            x_padded = self._pad(x)
        else:
            x_padded = x
            if grid.is_padded:  # what the projection makes of a zero token, whatever the projection is
                padding = self.qkv(torch.zeros(1, self.spec.dim, dtype=x.dtype, device=x.device))[0]
        out = functional.attend(self.qkv(x_padded), self.spec, self._parts(padding), backend=self.backend)
        return self._crop(self.wo(out), x)

    def _parts(self, padding: Tensor | None) -> functional.Parts:
        emb = self.router.emb if isinstance(self.router.emb, nn.Linear) else None
        return functional.Parts(
            lepe_weight=None if self.lepe is None else self.lepe.weight,
            lepe_bias=None if self.lepe is None else self.lepe.bias,
            padding=padding,
            router_weight=None if emb is None else emb.weight,
            router_bias=None if emb is None else emb.bias,
            kv_downsampling=None if isinstance(self.kv_down, nn.Identity) else self.kv_down,
        )
