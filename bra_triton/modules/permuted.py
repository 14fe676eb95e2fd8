"""The drop-in for copies of the original module that take NCHW maps and permute them inside."""

from torch import Tensor

from ..call import Call
from ..kernels.grid import RegionGrid
from .nhwc import BiLevelRoutingAttention


class PermutedBiLevelRoutingAttention(BiLevelRoutingAttention):
    """`BiLevelRoutingAttention` that takes and returns NCHW maps, as many copies of the original do.

    It computes the same as the NHWC module. `NCHWBiLevelRoutingAttention`, the authors' own NCHW form, does
    not: it pads differently and does not scale the router's logits. Arguments and errors are those of
    `BiLevelRoutingAttention`.

    Example:
        >>> PermutedBiLevelRoutingAttention(dim=64, n_win=8)(torch.randn(2, 64, 80, 80)).shape
        torch.Size([2, 64, 80, 80])
    """

    def forward(
        self, x: Tensor, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """`BiLevelRoutingAttention.forward` for `x` `(N, dim, H, W)`; the output has the same shape."""
        if not isinstance(x, Tensor):
            return self._leaf(x, ret_attn_mask)
        result = super().forward(x.permute(0, 2, 3, 1), ret_attn_mask)
        if isinstance(result, Tensor):
            return result.permute(0, 3, 1, 2)
        return result[0].permute(0, 3, 1, 2), *result[1:]

    def grid(self, x: Tensor) -> RegionGrid:
        """See `BiLevelRoutingAttention.grid`."""
        return super().grid(x.permute(0, 2, 3, 1))

    def call_of(self, x: Tensor) -> Call:
        """`BiLevelRoutingAttention.call_of` for `x` `(N, dim, H, W)`."""
        return super().call_of(x.permute(0, 2, 3, 1))
