"""The picture under the drawings, at the best resolution there is, and its place in the network's input."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .recording import LayerAttention, Recording


@dataclass(frozen=True)
class Prediction:
    """A box that the model found: label, confidence, and left, top, right, bottom in the picture's pixels."""

    label: str
    confidence: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """A picture and its place in the network's input.

    Attributes:
        pixels: `(H, W, 3)` uint8.
        width: columns of the network's input.
        height: rows of the network's input.
        scale: pixels of the input per pixel of the picture, which letterboxing resizes.
        left: width of the bar that letterboxing puts at the left, in pixels of the input.
        top: height of the bar that letterboxing puts at the top, in pixels of the input.
        predictions: the boxes that were found, the highest confidence first.
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int
    scale: float = 1.0
    left: float = 0.0
    top: float = 0.0
    predictions: tuple[Prediction, ...] = ()

    @classmethod
    def of(cls, recording: Recording) -> "Picture":
        """The original picture if a `YOLO` letterboxed it, else the network's input."""
        image = recording.image.numpy()
        height, width = image.shape[-2:]
        result = recording.result[0] if isinstance(recording.result, list) else recording.result
        original = getattr(result, "orig_img", None)
        if original is None or getattr(result, "probs", None) is not None:  # a classifier crops its pictures
            return cls(_shown(image), width, height)
        rows, columns = original.shape[:2]
        scale = min(height / rows, width / columns)
        left, top = (width - scale * columns) / 2, (height - scale * rows) / 2
        pixels = np.ascontiguousarray(original[..., ::-1])  # Ultralytics' pictures are blue, green, red
        return cls(pixels, width, height, scale, left, top, _predictions(result))

    def place(self, point: tuple[float, float] | None) -> tuple[float, float]:
        """Converts a point of the picture to pixels of the network's input.

        Args:
            point: x and y in the picture's pixels; by default the centre of the prediction with the highest
                confidence, or of the picture if there is none.

        Raises:
            ValueError: if the point lies outside, or is not two numbers.
        """
        rows, columns = self.pixels.shape[:2]
        if point is None:
            left, top, right, bottom = self.predictions[0].box if self.predictions else (0, 0, columns, rows)
            point = ((left + right) / 2, (top + bottom) / 2)
        try:
            x, y = (float(coordinate) for coordinate in point)
        except (TypeError, ValueError):
            raise ValueError(f"point must be x and y, two numbers, got {point!r}") from None
        if not (0 <= x < columns and 0 <= y < rows):
            raise ValueError(
                f"point must lie in the picture, which has {columns} x {rows} pixels, got {x},{y}"
            )
        return self.left + self.scale * x, self.top + self.scale * y

    def query(self, layer: LayerAttention, place: tuple[float, float]) -> tuple[int, int]:
        """The layer's region, and token in it, at a place in the network's input."""
        return layer.locate(place[0] / self.width, place[1] / self.height)

    def extent(self, layer: LayerAttention) -> tuple[float, float]:
        """Width and height of all the layer's regions, padding included, in the network's input."""
        grid = layer.grid
        return (
            grid.columns * grid.region_width * self.width / grid.width,
            grid.rows * grid.region_height * self.height / grid.height,
        )


def _shown(image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A network's input `(C, H, W)` as pixels `(H, W, 3)`, rescaled if its values are not from 0 to 1."""
    if image.shape[0] not in (1, 3):
        image = image.mean(axis=0, keepdims=True)
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        image = (image - low) / max(high - low, 1e-12)
    pixels = np.broadcast_to(image.transpose(1, 2, 0) * 255, (*image.shape[1:], 3))
    return cast("npt.NDArray[np.uint8]", pixels.round().astype(np.uint8))


def _predictions(result: Any) -> tuple[Prediction, ...]:
    """The boxes of a `Results` of Ultralytics."""
    boxes = getattr(result, "boxes", None)
    if boxes is None:
        return ()
    rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
    found = [Prediction(result.names[int(kind)], score, tuple(box)) for kind, score, box in rows]
    return tuple(sorted(found, key=lambda each: -each.confidence))
