"""Bi-level routing attention in YOLO26; importing this package registers the blocks in Ultralytics."""

from .modules import (
    C2BRA,
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    C3k2BRA,
    NCHWBiLevelRoutingAttention2d,
    default_num_heads,
    set_backend,
)
from .registration import register

__all__ = [
    "C2BRA",
    "BiFormerBlock",
    "BiLevelRoutingAttention2d",
    "C3k2BRA",
    "NCHWBiLevelRoutingAttention2d",
    "default_num_heads",
    "register",
    "set_backend",
]

register()
