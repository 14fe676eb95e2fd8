"""BiFormer, the authors' network, built with this package's attention.

If timm is installed, importing this package registers the models with it, so that
`timm.create_model("biformer_tiny", features_only=True)` works.
"""

import logging

from .model import (
    VARIANTS,
    BiFormer,
    BiFormerBackbone,
    DenseAttention,
    biformer_base,
    biformer_small,
    biformer_tiny,
)

__all__ = [
    "VARIANTS",
    "BiFormer",
    "BiFormerBackbone",
    "DenseAttention",
    "biformer_base",
    "biformer_small",
    "biformer_tiny",
]

try:
    from . import timm_models  # noqa: F401
except ImportError as error:  # timm is not installed, or is older than 1.0
    logging.getLogger("bra_triton").info("BiFormer is not registered with timm: %s", error)
