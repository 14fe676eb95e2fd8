"""Bi-level routing attention on fused Triton kernels, as drop-in PyTorch modules."""

from .environment import warn_of_unknown
from .migration import replace_attention
from .modules.nchw import NCHWBiLevelRoutingAttention, nchwBRA
from .modules.nhwc import BiLevelRoutingAttention

__version__ = "0.1.0"  # pyproject.toml reads it from here

__all__ = ["BiLevelRoutingAttention", "NCHWBiLevelRoutingAttention", "nchwBRA", "replace_attention"]

warn_of_unknown()
