"""BiFormer with the same structure and `state_dict` keys as rayleizhu/BiFormer `models/biformer.py`."""

import inspect
import math
from collections.abc import Mapping, Sequence, Sized
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..arguments import flag, is_real, is_whole, whole
from ..modules.block import Block
from ..modules.layers import depthwise_convolution
from ..modules.nhwc import BiLevelRoutingAttention, without_effect

# Values of `topks` that stand for dense attention instead of a number of regions.
DENSE, DENSE_WITH_LEPE = -1, -2
DENSE_HEADS = 8  # fixed in the authors' dense attention, whatever `head_dim` is

# The released models, as arguments of `BiFormer` and `BiFormerBackbone`.
VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": {"depth": (2, 2, 8, 2), "embed_dim": (64, 128, 256, 512)},
    "biformer_small": {"depth": (4, 4, 18, 4), "embed_dim": (64, 128, 256, 512)},
    "biformer_base": {"depth": (4, 4, 18, 4), "embed_dim": (96, 192, 384, 768)},
}


class DenseAttention(nn.Module):
    """Attention of every token to every other: the authors' `AttentionLePE`, in BiFormer's last stage.

    It differs from bi-level routing attention in which every region chooses all regions: the width of a head
    scales the logits, the projection has no bias, and LePE, the positional convolution, is applied to the
    input instead of the values. PyTorch's `scaled_dot_product_attention` computes the attention. On a GPU the
    backward of that function has the same bits in every run only under
    `torch.use_deterministic_algorithms(True)`.

    Args:
        dim: channels of the map, a multiple of 8: there are 8 heads.
        side_dwconv: kernel size (odd) of LePE; 0 for none.

    Raises:
        ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> DenseAttention(64)(torch.randn(2, 7, 7, 64)).shape
        torch.Size([2, 7, 7, 64])
    """

    def __init__(self, dim: int, side_dwconv: int = 5) -> None:
        super().__init__()
        if whole("dim", dim) % DENSE_HEADS:
            raise ValueError(f"dim must be a multiple of the {DENSE_HEADS} heads, got {dim}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = depthwise_convolution(dim, side_dwconv)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over a map `(N, H, W, dim)`; returns the same shape."""
        batch, height, width, dim = x.shape
        # reshape, because ONNX's opset 11 has no unflatten.
        qkv = self.qkv(x).reshape(batch, height * width, 3, DENSE_HEADS, dim // DENSE_HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        out = _attend(query, key, value).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if torch.onnx.is_in_onnx_export():  # opsets before 14 have no scaled_dot_product_attention
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class BiFormer(nn.Module):
    """The classifier: stages of blocks. The first stage's map has a quarter of the image's height and width.

    Every further stage halves both. The defaults are those of the released BiFormer-T; `VARIANTS` has the
    arguments that differ for S and B. The checkpoints that the authors released load with `strict=True`:
    `model.load_state_dict(torch.load(path)["model"])`.

    Some of the authors' arguments have the same value in every released model, and do not exist here:
    `pre_norm` (True), `before_attn_dwconv` (3), `mlp_dwconv` (False), `pe` and `representation_size` (none).
    `qk_dims` is `embed_dim`. `set_grad_checkpointing` replaces `use_checkpoint_stages`.

    Args:
        depth: blocks of each stage.
        embed_dim: channels of each stage.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; with 0 there is none, and `forward` returns pooled features.
        head_dim: width of a head of the routed attentions; divides their stages' channels.
        mlp_ratio: width of an MLP's hidden layer, divided by the channels.
        n_win: regions along each side of a map; or two numbers, `(rows, columns)`.
        topks: for each stage the number of regions that every region attends to; -1 for dense attention, -2
            for dense attention with LePE.
        side_dwconv: kernel size (odd) of LePE; 0 for none.
        drop_path_rate: probability that a sample skips the last block's attention or MLP in training. It
            grows linearly from 0 at the first block. Needs torchvision if it is not 0.
        layer_scale_init_value: initial value of the learned factors of attention and MLP, one for each
            channel; if it is not positive, as in the released models, there are no such factors.
        **attention: further arguments of `bra_triton.BiLevelRoutingAttention`, for all routed stages:
            `auto_pad`, `kv_downsample_mode`, `diff_routing`, `backend`, ...

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        TypeError: if neither this class nor the attention has such an argument.

    Example:
        >>> model = BiFormer(depth=(1, 1, 1, 1), num_classes=10)
        >>> model(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """

    grad_checkpointing = False

    def __init__(
        self,
        depth: Sequence[int] = VARIANTS["biformer_tiny"]["depth"],
        embed_dim: Sequence[int] = VARIANTS["biformer_tiny"]["embed_dim"],
        in_chans: int = 3,
        num_classes: int = 1000,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        n_win: int | tuple[int, int] = 7,
        topks: Sequence[int] = (1, 4, 16, DENSE_WITH_LEPE),
        side_dwconv: int = 5,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        _check_names(attention)
        _check_stages(depth, embed_dim, topks, head_dim)
        numbers = {"n_win": n_win, "head_dim": head_dim, "side_dwconv": side_dwconv}
        _check_effect(topks, {**numbers, **attention}, type(self))
        if reasons := [*without_effect(attention)]:
            raise ValueError("; ".join(reasons))
        check_number("drop_path_rate", drop_path_rate, 0, 1)
        check_number("layer_scale_init_value", layer_scale_init_value, -math.inf, math.inf)
        check_number("mlp_ratio", mlp_ratio, 1 / min(embed_dim), math.inf)
        self.num_classes = whole("num_classes", num_classes, 0)
        self.embed_dim = list(embed_dim)
        self.downsample_layers = nn.ModuleList(_downsampling_layers(whole("in_chans", in_chans), embed_dim))
        last = max(sum(depth) - 1, 1)
        drop_paths = (drop_path_rate * block / last for block in range(sum(depth)))
        self.stages = nn.ModuleList()
        attention["n_win"] = n_win
        for blocks, dim, topk in zip(depth, embed_dim, topks, strict=True):
            hidden = int(mlp_ratio * dim)
            stage = [
                Block(
                    dim,
                    _build_attention(dim, topk, head_dim, side_dwconv, attention),
                    hidden,
                    next(drop_paths),
                    layer_scale_init_value,
                )
                for _ in range(blocks)
            ]
            self.stages.append(nn.Sequential(*stage))
        self.norm = nn.BatchNorm2d(embed_dim[-1])
        self.reset_classifier(num_classes)
        self.apply(_initialise)

    def get_classifier(self) -> nn.Module:
        """The last layer: linear, or the identity if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the last layer by a new one of `num_classes` outputs, or by the identity for 0."""
        self.num_classes = whole("num_classes", num_classes, 0)
        dim = self.embed_dim[-1]
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.head.apply(_initialise)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the input of each block, and computes the block again in the backward.

        Example:
            >>> model = BiFormer(depth=(1, 1, 1, 1), num_classes=10)
            >>> model.set_grad_checkpointing()
            >>> model(torch.randn(2, 3, 224, 224)).sum().backward()  # takes less memory, and longer
        """
        self.grad_checkpointing = flag("enable", enable)

    def stage_maps(self, x: Tensor) -> list[Tensor]:
        """The output of every stage, `(N, embed_dim[i], H / (4 * 2**i), W / (4 * 2**i))`, for images."""
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            if self.grad_checkpointing and torch.is_grad_enabled():
                for block in stage.children():
                    x = checkpoint(block, x, use_reentrant=False)
            else:
                x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Any:
        """The last stage's output, normalised: `(N, embed_dim[-1], H / 32, W / 32)` for four stages."""
        return self.norm(self.stage_maps(x)[-1])

    def forward_head(self, x: Tensor) -> Tensor:
        """Maps the output of `forward_features` to logits `(N, num_classes)`."""
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        """Maps images `(N, in_chans, H, W)` to logits `(N, num_classes)`.

        Without `auto_pad=True` the sides of every routed stage's map must be multiples of `n_win`. For the
        released models this means that the sides of the image must be multiples of 112.
        """
        return self.forward_head(self.forward_features(x))


class BiFormerBackbone(BiFormer):
    """BiFormer without its classifier, for detection and segmentation: one map of each stage.

    Like the authors' `BiFormer_mm`, it has a LayerNorm for the map of each stage (`extra_norms`). Weights of
    a classifier load with `strict=False`: they lack `extra_norms`, and their `head` and `norm` are not used.
    The authors use `n_win=16` for detection and 8 for segmentation.

    Args:
        auto_pad: pad maps to multiples of `n_win`; by default True, since detectors take images of any size.
        **arguments: those of `BiFormer`, except `num_classes`.

    Raises:
        ValueError, TypeError: as `BiFormer`.

    Example:
        >>> backbone = BiFormerBackbone(depth=(1, 1, 1, 1), n_win=8)
        >>> [tuple(map.shape) for map in backbone(torch.randn(1, 3, 96, 128))]
        [(1, 64, 24, 32), (1, 128, 12, 16), (1, 256, 6, 8), (1, 512, 3, 4)]
    """

    def __init__(self, *, auto_pad: bool = True, **arguments: Any) -> None:
        if "num_classes" in arguments:
            raise TypeError(
                "BiFormerBackbone has no classifier and no argument num_classes, got "
                f"{arguments['num_classes']!r}; leave it out"
            )
        super().__init__(num_classes=0, auto_pad=auto_pad, **arguments)
        del self.norm, self.head
        self.extra_norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in self.embed_dim)

    def reset_classifier(self, num_classes: int) -> None:
        """Raises ValueError unless `num_classes` is 0: a backbone has no classifier."""
        if num_classes:
            raise ValueError(f"num_classes of a backbone must be 0, got {num_classes!r}")
        super().reset_classifier(0)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of all stages, the largest first, in channels-last memory."""
        return tuple(
            norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, x in zip(self.extra_norms, self.stage_maps(x), strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps images `(N, in_chans, H, W)` to the maps of all stages, as `forward_features` returns them."""
        return self.forward_features(x)


def biformer_tiny(**arguments: Any) -> BiFormer:
    """BiFormer-T, 13.1 million parameters; takes the arguments of `BiFormer`.

    Example:
        >>> with torch.device("meta"):  # no memory for weights
        ...     model = biformer_tiny()
        >>> sum(parameter.numel() for parameter in model.parameters())
        13142760
    """
    return BiFormer(**{**VARIANTS["biformer_tiny"], **arguments})


def biformer_small(**arguments: Any) -> BiFormer:
    """BiFormer-S, 25.5 million parameters; takes the arguments of `BiFormer`.

    Example:
        >>> with torch.device("meta"):  # no memory for weights
        ...     model = biformer_small(num_classes=10)
        >>> model.get_classifier()
        Linear(in_features=512, out_features=10, bias=True)
    """
    return BiFormer(**{**VARIANTS["biformer_small"], **arguments})


def biformer_base(**arguments: Any) -> BiFormer:
    """BiFormer-B, 56.8 million parameters; takes the arguments of `BiFormer`.

    Example:
        >>> with torch.device("meta"):  # no memory for weights
        ...     model = biformer_base()
        >>> model.embed_dim
        [96, 192, 384, 768]
    """
    return BiFormer(**{**VARIANTS["biformer_base"], **arguments})


def _downsampling_layers(in_chans: int, embed_dim: Sequence[int]) -> list[nn.Sequential]:
    """For each stage the layers that make its map: two convolutions of stride 2 for the first, else one."""

    def halve(c1: int, c2: int) -> list[nn.Module]:
        return [nn.Conv2d(c1, c2, 3, stride=2, padding=1), nn.BatchNorm2d(c2)]

    first = embed_dim[0]
    stem = nn.Sequential(*halve(in_chans, first // 2), nn.GELU(), *halve(first // 2, first))
    return [stem, *(nn.Sequential(*halve(*widths)) for widths in pairwise(embed_dim))]


def _build_attention(
    dim: int, topk: int, head_dim: int, side_dwconv: int, attention: dict[str, Any]
) -> BiLevelRoutingAttention | DenseAttention:
    if topk in (DENSE, DENSE_WITH_LEPE):
        return DenseAttention(dim, side_dwconv if topk == DENSE_WITH_LEPE else 0)
    return BiLevelRoutingAttention(dim, dim // head_dim, topk=topk, side_dwconv=side_dwconv, **attention)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_names(attention: Mapping[str, Any]) -> None:
    """Raises TypeError for a name that the attention does not have, or that is set for every stage."""
    own = [name for name in inspect.signature(BiFormer).parameters if name != "attention"]
    theirs = inspect.signature(BiLevelRoutingAttention).parameters.keys() - {"dim", "num_heads", "topk", *own}
    if unknown := [name for name in attention if name not in theirs]:
        raise TypeError(
            f"BiFormer has no argument {unknown[0]!r}; allowed are {', '.join((*own, *sorted(theirs)))}"
        )


def _check_stages(
    depth: Sequence[int], embed_dim: Sequence[int], topks: Sequence[int], head_dim: int
) -> None:
    """Raises ValueError if the arguments do not describe stages."""
    lengths = {len(given) if isinstance(given, Sized) else 0 for given in (depth, embed_dim, topks)}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            "depth, embed_dim and topks must have one entry for each stage, "
            f"got {depth}, {embed_dim} and {topks}"
        )
    whole("head_dim", head_dim)
    for stage, (blocks, dim, topk) in enumerate(zip(depth, embed_dim, topks, strict=True)):
        whole(f"depth[{stage}]", blocks)
        whole(f"embed_dim[{stage}]", dim, 2)
        if topk not in (DENSE, DENSE_WITH_LEPE):
            if not is_whole(topk):
                raise ValueError(f"topks[{stage}] must be an int of at least 1, or -1 or -2, got {topk!r}")
            if dim % head_dim:
                raise ValueError(f"embed_dim[{stage}] must be a multiple of head_dim={head_dim}, got {dim}")
        elif dim % DENSE_HEADS:
            raise ValueError(f"embed_dim[{stage}] must be a multiple of the {DENSE_HEADS} heads, got {dim}")


def _check_effect(topks: Sequence[int], given: Mapping[str, Any], kind: type[BiFormer]) -> None:
    """Raises ValueError if no stage uses an argument of the attention; the default of `kind` may be given."""
    if max(topks) >= 1:
        return
    defaults: dict[str, inspect.Parameter] = {}
    for base in reversed(kind.__mro__):  # each class passes its own defaults on to the next
        if issubclass(base, BiFormer):
            defaults |= inspect.signature(base).parameters
    used = {"side_dwconv"} if DENSE_WITH_LEPE in topks else set()
    idle = [
        name
        for name, value in given.items()
        if name not in used and (name not in defaults or value != defaults[name].default)
    ]
    if idle:
        raise ValueError(
            f"no stage of topks={topks} is routed, so these attention arguments have no effect: {idle}"
        )


def check_number(name: str, value: Any, least: float, under: float) -> None:
    """Raises ValueError unless `value` is a number from `least` to under `under`."""
    if not is_real(value) or not least <= value < under:
        raise ValueError(f"{name} must be a number from {least} to under {under}, got {value!r}")
