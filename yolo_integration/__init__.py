"""Bi-level routing attention in YOLO26; importing this package registers the blocks in Ultralytics."""

from importlib.util import find_spec

if find_spec("ultralytics") is None:
    raise ModuleNotFoundError(
        "bra_triton.yolo_integration needs Ultralytics: pip install 'ultralytics>=8.4.140'",
        name="ultralytics",
    )

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
