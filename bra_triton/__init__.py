"""Bi-level routing attention on fused Triton kernels, as a drop-in PyTorch module."""

from .attention import BiLevelRoutingAttention

__all__ = ["BiLevelRoutingAttention"]
