"""Bi-level routing attention on fused Triton kernels, as drop-in PyTorch modules."""

from .modules.nchw import NCHWBiLevelRoutingAttention, nchwBRA
from .modules.nhwc import BiLevelRoutingAttention

__all__ = ["BiLevelRoutingAttention", "NCHWBiLevelRoutingAttention", "nchwBRA"]
