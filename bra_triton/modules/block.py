"""The block that BiFormer is made of."""

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A position convolution, then attention, then an MLP, each added to its input.

    A LayerNorm stands before the attention and another before the MLP. The parameters are those of the
    authors' block (rayleizhu/BiFormer, `models/biformer.py`). The map is copied to channels-last memory once,
    for the norms, the attention and the MLP together; a map that is channels-last already is not copied.

    Args:
        dim: channels of the map.
        attention: maps `(N, H, W, dim)` to the same shape.
        hidden: width of the MLP's hidden layer.
        drop_path: probability with which a sample skips attention or MLP in training (stochastic depth).
        layer_scale_init_value: initial value of `gamma1` and `gamma2`, the learned factors of attention and
            MLP, `(dim,)` each; if it is not positive, there are no such factors.

    Raises:
        ModuleNotFoundError: if `drop_path` is positive and torchvision, which computes it, is not installed.

    Example:
        >>> Block(64, nn.Identity(), 192)(torch.randn(2, 64, 20, 20)).shape
        torch.Size([2, 64, 20, 20])
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        hidden: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 0.0,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # The identity: the authors' block can have a convolution here, but no released model has one.
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = _stochastic_depth(drop_path)
        for name in ("gamma1", "gamma2"):
            scale = nn.Parameter(torch.full((dim,), layer_scale_init_value))
            self.register_parameter(name, scale if layer_scale_init_value > 0 else None)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, dim, H, W)` of any strides to the same shape, in channels-last memory."""
        x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1).contiguous()
        x = x + self._branch(self.attn(self.norm1(x)), self.gamma1)
        x = x + self._branch(self.mlp(self.norm2(x)), self.gamma2)
        return x.permute(0, 3, 1, 2)

    def _branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return self.drop_path(y if scale is None else scale * y)


def _stochastic_depth(probability: float) -> Any:
    if not probability:
        return nn.Identity()
    try:
        from torchvision.ops import StochasticDepth
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"stochastic depth (drop_path={probability}) needs torchvision: pip install torchvision",
            name=error.name,
        ) from error
    return StochasticDepth(probability, "row")
