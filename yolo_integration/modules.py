"""YOLO blocks built on bi-level routing attention. Maps come in and go out as NCHW, as Ultralytics has them.

All blocks take the attention's arguments as one mapping, because a yaml row has no keyword arguments. By
default heads are about 32 channels wide, there are 5 x 5 regions (`N_WIN`), and maps of any size are accepted
(`auto_pad`).
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.model import Model
from ultralytics.nn.modules.block import Bottleneck, C2f
from ultralytics.nn.modules.conv import Conv
from ultralytics.utils import LOGGER

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.arguments import is_real, whole
from bra_triton.backend import select
from bra_triton.checkpoint_keys import TakesNames
from bra_triton.export import is_eager
from bra_triton.kernels.grid import RegionGrid
from bra_triton.modules.base import Attention
from bra_triton.modules.block import Block

HEAD_DIM = 32
# Default of `n_win`. 5 divides the maps of images of 320, 480, 640, 800 and 960 pixels at every stride from 8
# to 32. At 736 pixels, the other usual size, at most 15 % of the tokens are padding (27 % in the NCHW form).
# With 7, the default of the drop-in module, up to 49 % are padding at these sizes.
N_WIN = 5
# A warning is logged if a larger share of the tokens is padding.
MOST_PADDING = 0.2
# Values of `n_win` that the warning advises. For every image of 320 to 1280 pixels (a multiple of 32), at
# strides of 8 to 32, one of them leaves at most 16 % padding, in the NHWC form as in the NCHW form.
ADVISED_N_WIN = range(4, 9)
# How a form of the attention cuts a map: from its height, its width and the two numbers of `n_win`.
GridOf = Callable[[int, int, tuple[int, int]], RegionGrid]


def default_num_heads(dim: int, qk_dim: int | None = None) -> int:
    """The number of heads whose width is closest to 32 channels, as in BiFormer.

    Args:
        dim: channels of the map.
        qk_dim: channels of queries and keys; `dim` by default.

    Returns:
        The common divisor of `dim` and `qk_dim` that makes `dim // num_heads` closest to 32; if two are
        equally close, the larger one.

    Raises:
        ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> default_num_heads(128)
        4
    """
    common = math.gcd(whole("dim", dim), whole("qk_dim", dim if qk_dim is None else qk_dim))
    divisors = [heads for heads in range(1, common + 1) if common % heads == 0]
    return min(divisors, key=lambda heads: (abs(dim // heads - HEAD_DIM), -heads))


def build_attention(dim: int, arguments: Mapping[str, Any] | None = None) -> BiLevelRoutingAttention:
    """The drop-in attention (NHWC) with the defaults of the YOLO blocks.

    Args:
        dim: channels of the map.
        arguments: arguments of `bra_triton.BiLevelRoutingAttention` by name; they override the defaults.

    Raises:
        ValueError: if the attention rejects a value.
        TypeError: if the attention has no such argument.
    """
    return BiLevelRoutingAttention(dim, **_with_defaults(dim, arguments))


def _with_defaults(dim: int, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    chosen = {"num_heads": None, "n_win": N_WIN, "auto_pad": True, **(arguments or {})}
    if chosen["num_heads"] is None:
        chosen["num_heads"] = default_num_heads(dim, chosen.get("qk_dim"))
    return chosen


def _check_padding(attention: Any, x: Tensor, grid_of: GridOf = RegionGrid.of_windows) -> None:
    """Warns of much padding in training. In eval, Ultralytics builds and measures models on other sizes.

    Blocks call it after the attention, which has then raised the errors about a map that it does not take.
    """
    if attention.training and is_eager() and isinstance(x, Tensor):  # torch.fx passes a proxy
        _warn_of_padding(grid_of, x.shape[2], x.shape[3], attention.spec.windows, attention.spec.topk)


@lru_cache(1024)
def _warn_of_padding(grid_of: GridOf, height: int, width: int, windows: tuple[int, int], topk: int) -> None:
    """Warns once for every size of a map. Much padding matters because it takes part in the softmax."""
    grid = grid_of(height, width, windows)
    share = grid.share_of_padding
    if share > MOST_PADDING:
        better = _advised_n_win(grid_of, height, topk), _advised_n_win(grid_of, width, topk)
        least = grid_of(height, width, better).share_of_padding
        advice = "Choose another imgsz"
        if least <= MOST_PADDING:  # else: a map with a side under 4, for example
            n_win = better[0] if better[0] == better[1] else list(better)
            advice = f"With n_win: {n_win} it would be {least:.0%}; or choose another imgsz"
        LOGGER.warning(
            f"{share:.0%} of the tokens attended to are padding: {grid.rows} x {grid.columns} regions "
            f"on a map of {height} x {width}. {advice}"
        )


def _advised_n_win(grid_of: GridOf, side: int, topk: int) -> int:
    """The `n_win` for a map's side that pads it least; among equals the closest to `N_WIN`.

    Two kinds of numbers are left out. With a number whose square is below `topk`, a map with the same number
    for its other side would have fewer than `topk` regions. And a number may cut the side into more regions
    than the largest of `ADVISED_N_WIN`: the NCHW form cuts 15 tokens into 15 regions if `n_win` is 8. If no
    number remains, the largest one is returned.
    """
    grids = {n_win: grid_of(side, side, (n_win, n_win)) for n_win in ADVISED_N_WIN}
    most = ADVISED_N_WIN[-1]
    allowed = [n_win for n_win, grid in grids.items() if n_win**2 >= topk and grid.rows <= most] or [most]
    return min(allowed, key=lambda n_win: (grids[n_win].padding[0], abs(n_win - N_WIN)))


def _hidden_channels(name: str, ratio: float, channels: int) -> int:
    """`ratio * channels`, rounded down; raises ValueError about the argument `name` if that is below 1."""
    if not is_real(ratio) or not 1 <= ratio * channels < math.inf:
        raise ValueError(
            f"{name} must be a number that leaves at least 1 of {channels} channels, got {ratio!r}"
        )
    return int(ratio * channels)


def set_backend(model: nn.Module, backend: str) -> None:
    """Sets the backend of every bi-level routing attention in a model.

    It has no effect on `YOLO.train`, which builds the model anew from its yaml: give the backend in the rows,
    `{backend: torch}`. A warning is logged if a setting is lost in this way.

    Args:
        model: any module, or a `YOLO` of Ultralytics. A `YOLO` that has predicted sets up its predictor anew,
            and so forgets the objects that it was tracking.
        backend: `"auto"`, or a name that `bra_triton.BiLevelRoutingAttention` takes.

    Raises:
        ValueError: if there is no such backend, or if the model holds no attention of this package.

    Example:
        >>> model = nn.Sequential(BiFormerBlock(64))
        >>> set_backend(model, "torch")
        >>> model[0].attn.backend
        'torch'
    """
    select.check_name(backend)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    if not attentions:
        raise ValueError(
            "model must hold a bi-level routing attention of this package, got a "
            f"{type(model).__name__} without one; bra_triton.replace_attention replaces other implementations"
        )
    for attention in attentions:
        attention.backend = backend
    if isinstance(model, Model):
        model.predictor = None  # it predicts with a copy of the network, whose attentions are not among these


def has_attention(model: nn.Module) -> bool:
    """Whether a model holds a bi-level routing attention of this package."""
    return any(isinstance(module, Attention) for module in model.modules())


class HoldsAttention(nn.Module):
    """The base of the blocks: refuses the settings of the attention inside, which have no effect on a block.

    Classes that others derive from the blocks may have attributes of these names.

    Raises:
        AttributeError: if `topk`, `n_win`, `backend` or another of these settings is set on the block.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self) and type(self).__module__ == __name__:
            for layer, module in self.named_modules():
                if isinstance(module, Attention) and name in module.settable():
                    raise AttributeError(
                        f"{name} cannot be set on a {type(self).__name__}, got {value!r}: set it on the "
                        f"attention inside, {layer}"
                    )
        super().__setattr__(name, value)


class BiLevelRoutingAttention2d(HoldsAttention, TakesNames):
    """The drop-in attention over an NCHW map: the class of yaml rows named `BiLevelRoutingAttention`.

    It permutes the map to NHWC and back, which changes strides only: a map in channels-last memory is never
    copied, and the output is in channels-last memory.

    Args:
        dim: channels of the map.
        attention: arguments of `bra_triton.BiLevelRoutingAttention` by name.

    Example:
        >>> BiLevelRoutingAttention2d(64, {"n_win": 8})(torch.randn(2, 64, 20, 20)).shape
        torch.Size([2, 64, 20, 20])
    """

    def __init__(self, dim: int, attention: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.attn = build_attention(dim, attention)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over `(N, dim, H, W)` of any strides; returns the same shape."""
        out = self.attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        _check_padding(self.attn, x)
        return out


class NCHWBiLevelRoutingAttention2d(HoldsAttention, TakesNames):
    """The NCHW drop-in: the class of yaml rows named `nchwBRA` or `NCHWBiLevelRoutingAttention`.

    A map in channels-last memory is not copied; the output is in channels-last memory.

    Args:
        dim: channels of the map.
        attention: arguments of `bra_triton.NCHWBiLevelRoutingAttention` by name.

    Example:
        >>> NCHWBiLevelRoutingAttention2d(64, {"n_win": 8})(torch.randn(2, 64, 20, 20)).shape
        torch.Size([2, 64, 20, 20])
    """

    def __init__(self, dim: int, attention: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.attn = NCHWBiLevelRoutingAttention(dim, **_with_defaults(dim, attention))

    def forward(self, x: Tensor) -> Tensor:
        """Attends over `(N, dim, H, W)` of any strides; returns the same shape."""
        out = self.attn(x)
        _check_padding(self.attn, x, RegionGrid.of_nchw)
        return out


class BiFormerBlock(HoldsAttention, Block, TakesNames):
    """A block of BiFormer: a position convolution, then attention, then an MLP, each added to its input.

    After Zhu et al. (CVPR 2023), figure 3, without stochastic depth and layer scale. Strides are as in
    `bra_triton.modules.block.Block`.

    Args:
        dim: channels of the map.
        attention: arguments of `bra_triton.BiLevelRoutingAttention` by name.
        mlp_ratio: width of the MLP's hidden layer, divided by `dim`; 3 in BiFormer's released models.

    Raises:
        ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> BiFormerBlock(64, {"topk": 4})(torch.randn(2, 64, 20, 20)).shape
        torch.Size([2, 64, 20, 20])
    """

    def __init__(self, dim: int, attention: Mapping[str, Any] | None = None, mlp_ratio: float = 3.0) -> None:
        hidden = _hidden_channels("mlp_ratio", mlp_ratio, dim)
        super().__init__(dim, build_attention(dim, attention), hidden)
        del self.mlp[1]  # the identity: without it the keys of the last layer are `mlp.2.*`

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, dim, H, W)` of any strides to the same shape, in channels-last memory."""
        out = super().forward(x)
        _check_padding(self.attn, x)
        return out


class BRABlock(HoldsAttention):
    """Attention, then a convolutional feed-forward, each added to its input: in `C2BRA` and `C3k2BRA`.

    It is built like Ultralytics' `PSABlock`, with the same names for the same layers.

    Args:
        dim: channels of the map.
        attention: arguments of `bra_triton.BiLevelRoutingAttention` by name.
    """

    def __init__(self, dim: int, attention: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.attn = BiLevelRoutingAttention2d(dim, attention)
        self.ffn = nn.Sequential(Conv(dim, 2 * dim, 1), Conv(2 * dim, dim, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, dim, H, W)` to the same shape."""
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2BRA(HoldsAttention):
    """A cross-stage partial stage of attention blocks; it replaces and resembles Ultralytics' `C2PSA`.

    Half of the hidden channels bypass the blocks. The output may have another width than the input, which
    `C2PSA` does not allow.

    Args:
        c1: input channels.
        c2: output channels.
        n: inner blocks.
        attention: arguments of `bra_triton.BiLevelRoutingAttention` by name.
        e: channels of the half that passes through the blocks, divided by `c2`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> C2BRA(64, 128, 2, {"topk": 4})(torch.randn(2, 64, 20, 20)).shape
        torch.Size([2, 128, 20, 20])
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, attention: Mapping[str, Any] | None = None, e: float = 0.5
    ) -> None:
        super().__init__()
        self.c = _hidden_channels("e", e, c2)
        self.cv1 = Conv(c1, 2 * self.c, 1)
        self.cv2 = Conv(2 * self.c, c2, 1)
        self.m = nn.Sequential(*(BRABlock(self.c, attention) for _ in range(whole("n", n))))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, c1, H, W)` to `(N, c2, H, W)`."""
        bypass, attended = self.cv1(x).split(self.c, dim=1)
        return self.cv2(torch.cat((bypass, self.m(attended)), dim=1))


class C3k2BRA(HoldsAttention, C2f):
    """A `C3k2` of Ultralytics with bi-level routing attention in its inner blocks; made for necks.

    It resembles `C3k2` with `attn=True`, the last row before YOLO26's head: an inner block is a `Bottleneck`
    followed by a `BRABlock` instead of a `PSABlock`. Layers that are the same have the same names.

    Args:
        c1: input channels.
        c2: output channels.
        n: inner blocks.
        attention: arguments of `bra_triton.BiLevelRoutingAttention` by name.
        e: channels of an inner block, divided by `c2`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> C3k2BRA(192, 128, 1, {"topk": 4})(torch.randn(2, 192, 20, 20)).shape
        torch.Size([2, 128, 20, 20])
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, attention: Mapping[str, Any] | None = None, e: float = 0.5
    ) -> None:
        _hidden_channels("e", e, c2)
        super().__init__(c1, c2, whole("n", n), e=e)
        self.m = nn.ModuleList(
            nn.Sequential(Bottleneck(self.c, self.c), BRABlock(self.c, attention)) for _ in range(n)
        )
