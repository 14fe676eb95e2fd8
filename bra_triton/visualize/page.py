"""The page: one HTML file, for any browser, that shows every layer and head for the point at the pointer.

The file contains the picture, the routing and all weights. It loads nothing else, which its content security
policy enforces.
"""

import base64
import io
import json
import zlib
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image

from .picture import Picture
from .recording import LayerAttention

# The most weights on a page, of one byte each. To unpack them, a browser needs several times this memory.
MOST_BYTES = 128 * 2**20
LEVELS = 255


def build(picture: Picture, layers: list[LayerAttention], place: tuple[float, float]) -> str:
    """The page's text.

    Args:
        picture: the picture under the drawings.
        layers: the layers that the page shows.
        place: the first query point, x and y in pixels of the network's input.

    Raises:
        ValueError: if the weights take more than `MOST_BYTES`; names the layers and their sizes.
    """
    size = sum(layer.weights.numel() for layer in layers)
    if size > MOST_BYTES:
        listed = ", ".join(f"{layer.name}: {layer.weights.numel() / 2**20:.0f} MiB" for layer in layers)
        raise ValueError(
            f"layers must have at most {MOST_BYTES / 2**20:.0f} MiB of attention weights for a page, "
            f"got {size / 2**20:.0f} ({listed}); choose fewer layers or a smaller image"
        )
    data = {
        "picture": _jpeg(picture),
        "place": place,
        **{name: getattr(picture, name) for name in ("width", "height", "scale", "left", "top")},
        "predictions": [
            {"label": each.label, "confidence": each.confidence, "box": each.box}
            for each in picture.predictions
        ],
        "layers": [_described(layer) for layer in layers],
    }
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    # Escape "<": a "</script>" in the data would end the script.
    return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)


def _described(layer: LayerAttention) -> dict[str, Any]:
    """A layer's data as the page's script reads them; arrays are little-endian, deflated, in base 64."""
    grid, kv_grid = layer.grid, layer.kv_grid
    peaks = layer.weights.amax(dim=-1)
    levels = (layer.weights / peaks.clamp(min=1e-30)[..., None] * LEVELS).round().to(torch.uint8)
    return {
        "name": layer.name,
        "heads": layer.num_heads,
        "topk": layer.topk,
        **{name: getattr(grid, name) for name in ("height", "width", "rows", "columns")},
        "region": (grid.region_height, grid.region_width),
        "cells": (kv_grid.region_height, kv_grid.region_width),
        "routes": _packed(layer.r_idx.numpy().astype("<u4")),
        "routing": _packed(layer.r_weight.numpy().astype("<f4")),
        "peaks": _packed(peaks.numpy().astype("<f4")),
        "levels": _packed(levels.numpy()),
    }


def _packed(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes())).decode()


def _jpeg(picture: Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.pixels).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
