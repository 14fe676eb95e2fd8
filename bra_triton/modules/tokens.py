"""The drop-in for models that hold a map as a sequence of tokens, such as timm's vision transformers."""

import math
from typing import Any

import torch
from torch import Tensor

from ..arguments import dense_floats, flag, whole_pair
from ..export import is_eager
from .nhwc import BiLevelRoutingAttention


class TokenBiLevelRoutingAttention(BiLevelRoutingAttention):
    """`BiLevelRoutingAttention` that takes and returns a map as a sequence of tokens, row by row.

    It can replace `attn` in timm's blocks. A class token, or any other token that is not on the map, has no
    region; build the model without it, with average pooling (`class_token=False, global_pool="avg"` in timm).

    Args:
        arguments: those of `BiLevelRoutingAttention`, by position.
        size: height and width of the map; by default the map is square.
        named: those of `BiLevelRoutingAttention`, by name.

    Example:
        >>> TokenBiLevelRoutingAttention(64, 2, n_win=7)(torch.randn(2, 14 * 14, 64)).shape
        torch.Size([2, 196, 64])
    """

    def __init__(self, *arguments: Any, size: tuple[int, int] | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.size = size

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "size" and value is not None:
            value = whole_pair("size", value)
        super().__setattr__(name, value)

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, ret_attn_mask: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """`BiLevelRoutingAttention.forward` for `x` `(N, H * W, dim)`; the output has the same shape.

        Args:
            x: the tokens, row by row.
            attn_mask: must be None; timm's blocks pass this argument.
            is_causal: must be False; timm's blocks pass this argument.
            ret_attn_mask: as in the base class.

        Raises:
            ValueError: for a mask, or if `x` does not have as many tokens as the map; and as the base class.
        """
        if not isinstance(x, Tensor):
            return self._leaf(x, attn_mask, is_causal, ret_attn_mask)
        if is_eager():  # not in an export: ONNX's legacy exporter passes a tensor
            is_causal = flag("is_causal", is_causal)
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attn_mask must be None and is_causal False, because the routing decides which tokens are "
                f"attended to, got attn_mask={attn_mask!r} and is_causal={is_causal!r}"
            )
        return super().forward(x, ret_attn_mask)

    def _map_of(self, x: Tensor) -> Tensor:
        """The tokens as an NHWC map. It is made by `reshape`: ONNX's opset 11 has no `unflatten`."""
        if dense_floats("x", x).dim() != 3:
            raise ValueError(f"x must be (N, H * W, dim), got shape {tuple(x.shape)}")
        side = 0 if self.size else _root(x.shape[1])
        height, width = self.size or (side, side)
        if x.shape[1] != height * width:
            raise ValueError(
                f"x must have the {height} x {width} tokens of the map, got {x.shape[1]}; for a map that is "
                "not square set `size` of the module to its height and width; a class token is not part of "
                "the map"
            )
        return x.reshape(x.shape[0], height, width, x.shape[2])

    def _of_map(self, out: Tensor) -> Tensor:
        return out.flatten(1, 2)


def _root(tokens: Any) -> Any:
    """The side of a square map of `tokens` tokens, rounded down. `isqrt` takes no symbols of a compiler."""
    return torch.sym_int(tokens**0.5) if torch.compiler.is_compiling() else math.isqrt(tokens)
