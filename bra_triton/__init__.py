"""Bi-level routing attention on fused Triton kernels, as drop-in PyTorch modules."""

from .attention import BiLevelRoutingAttention
from .nchw_attention import NCHWBiLevelRoutingAttention, nchwBRA

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = ["BiLevelRoutingAttention", "NCHWBiLevelRoutingAttention", "nchwBRA"]
