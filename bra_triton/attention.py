"""The drop-in module: the original's arguments and `state_dict`, on the fused backends."""

from torch import Tensor, nn

from . import functional, reference
from .backend import registry


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
        kv_downsample_mode: `"identity"` alone on the fused backends so far.
        topk: regions that every region attends to.
        param_attention: `"qkvo"` or `"qkv"`.
        param_routing: not on the fused backends so far.
        diff_routing: not on the fused backends so far.
        soft_routing: not on the fused backends so far.
        side_dwconv: kernel size of LePE; 0 for none.
        auto_pad: zero-pad the map to multiples of `n_win`.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        NotImplementedError: naming a mode that no fused backend computes.
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
        if registry.check_name(name) != "reference":
            self._refuse_unfused_modes()
        self._backend = name

    def _refuse_unfused_modes(self) -> None:
        unfused = [f"{name}=True" for name in ("diff_routing", "soft_routing") if getattr(self, name)]
        if not isinstance(self.kv_down, nn.Identity):
            unfused.append(f"kv_downsample_mode={self.kv_downsample_mode!r}")
        if unfused:
            raise NotImplementedError(
                f"no fused backend computes {', '.join(unfused)} yet; backend='reference' does, with the "
                "gathered keys and values in memory"
            )

    def forward(
        self, x: Tensor, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attends over a map.

        Args:
            x: `(N, H, W, dim)`, float32, float16, bfloat16 or float64, of any strides.
            ret_attn_mask: return routing and attention matrix too; for looking, runs the reference.

        Returns:
            `(N, H, W, dim)`; with `ret_attn_mask` also `r_weight` and `r_idx` `(N, P, topk)` and
            `attn_weight` `(N*P, num_heads, S, topk*S)`.
        """
        if ret_attn_mask or self.backend == "reference":
            return super().forward(x, ret_attn_mask)
        qkv = self.qkv(self._pad(x))
        spec = self.spec
        lepe = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
        out = functional.attend(qkv, spec, *lepe, backend=self.backend)
        return self._crop(self.wo(out), x)
