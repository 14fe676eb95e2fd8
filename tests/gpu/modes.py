"""Every mode of the modules, under a name, and the sizes of maps for the interpreter and for a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from modules import reference_of
from torch import Tensor, nn

import bra_triton


@dataclass(frozen=True)
class Size:
    """A square NHWC map, and how it is cut into regions."""

    side: int
    dim: int
    num_heads: int
    n_win: int
    topk: int
    batch: int = 2


# Lists of 50 tokens: a full tile and a tail.
INTERPRETED = (Size(10, 32, 2, 2, 2, batch=1),)
# Regions of 25 tokens, which no tile size divides; stage 2 of BiFormer-T; YOLO's P4 in regions of 100 tokens,
# which take several tiles.
ON_GPU = (Size(15, 32, 1, 3, 3), Size(28, 128, 4, 7, 4), Size(40, 64, 2, 4, 4))


@dataclass(frozen=True)
class Mode:
    """Arguments that turn a mode on.

    Attributes:
        name: the name in the ids of tests.
        arguments: the module's arguments.
        cut: rows and columns to cut off at the bottom and the right, so that the map needs padding.
        qk_share: `qk_dim / dim`.
        nchw: whether the mode is one of the NCHW module.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    cut: tuple[int, int] = (0, 0)
    qk_share: float = 1
    nchw: bool = False

    def pair(self, size: Size, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """The module on the Triton backend and the float64 reference, with the same weights, in eval."""
        arguments = {"num_heads": size.num_heads, "n_win": size.n_win, "topk": size.topk, **self.arguments}
        if not self.nchw:
            arguments["qk_dim"] = int(size.dim * self.qk_share)
        kind = bra_triton.nchwBRA if self.nchw else bra_triton.BiLevelRoutingAttention
        module = kind(size.dim, **arguments, backend="triton").to(device).eval()
        return module, reference_of(module)

    def map(self, size: Size, device: torch.device, seed: int) -> Tensor:
        """Float64 values that bfloat16 holds exactly: random tokens around random means of their regions."""
        generator = torch.Generator().manual_seed(seed)
        region = size.side // size.n_win
        means = torch.randn(size.batch, size.n_win, size.n_win, size.dim, generator=generator)
        x = means.repeat_interleave(region, 1).repeat_interleave(region, 2)
        x = x + torch.randn(x.shape, generator=generator)
        x = x[:, : size.side - self.cut[0], : size.side - self.cut[1]].bfloat16().double().to(device)
        return x.permute(0, 3, 1, 2) if self.nchw else x


def _mode(name: str, *, cut: tuple[int, int] = (0, 0), qk_share: float = 1, **arguments: Any) -> Mode:
    return Mode(name, MappingProxyType(arguments), cut, qk_share)


DIFF = {"diff_routing": True}
SOFT = {"soft_routing": True}
MODES = (
    _mode("identity"),
    _mode("ada_avgpool", kv_downsample_mode="ada_avgpool", kv_per_win=2),
    _mode("ada_maxpool", kv_downsample_mode="ada_maxpool", kv_per_win=2),
    _mode("avgpool", kv_downsample_mode="avgpool", kv_downsample_ratio=2),
    _mode("maxpool", kv_downsample_mode="maxpool", kv_downsample_ratio=2),
    _mode("fracpool", kv_downsample_mode="fracpool", kv_downsample_ratio=1.5),
    _mode("conv", kv_downsample_mode="conv", kv_downsample_ratio=2),
    _mode("soft", **SOFT),
    _mode("soft_diff", **SOFT, **DIFF),
    _mode("hard", **DIFF),
    _mode("param_routing", **SOFT, **DIFF, param_routing=True),
    _mode("auto_pad", auto_pad=True, cut=(1, 2)),
    _mode("auto_pad_soft_diff", auto_pad=True, cut=(2, 1), **SOFT, **DIFF),
    _mode("auto_pad_maxpool", auto_pad=True, cut=(1, 1), kv_downsample_mode="maxpool", kv_downsample_ratio=2),
    _mode("auto_pad_conv", auto_pad=True, cut=(1, 2), kv_downsample_mode="conv", kv_downsample_ratio=2),
    _mode("no_lepe", side_dwconv=0),
    _mode("lepe_5", side_dwconv=5),
    _mode("qk_narrow", qk_share=0.5),
    _mode("qk_wide_avgpool", qk_share=2, kv_downsample_mode="avgpool", kv_downsample_ratio=2),
    _mode("qkv", param_attention="qkv"),
    Mode("nchw", nchw=True),
    Mode("nchw_padded", cut=(1, 2), nchw=True),
)
