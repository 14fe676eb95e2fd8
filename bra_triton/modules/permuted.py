"""The drop-in for copies of the original module that take NCHW maps and permute them inside."""

from torch import Tensor

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

    def _map_of(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def _of_map(self, out: Tensor) -> Tensor:
        return out.permute(0, 3, 1, 2)
