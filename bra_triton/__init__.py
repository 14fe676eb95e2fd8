"""Bi-level routing attention on fused Triton kernels, as drop-in PyTorch modules."""

from .attention import BiLevelRoutingAttention
from .nchw_attention import NCHWBiLevelRoutingAttention, nchwBRA

__all__ = ["BiLevelRoutingAttention", "NCHWBiLevelRoutingAttention", "nchwBRA"]
