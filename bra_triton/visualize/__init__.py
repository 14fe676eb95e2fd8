"""Pictures of what the attention looks at: routed regions and weights, in any model with the drop-in modules.

`attention_figure` makes a figure for one query point, `attention_page` a page in which the pointer is the
query point, and `record` returns the numbers behind both. They need matplotlib (`pip install matplotlib`;
Ultralytics installs it). The forward of the drop-in modules has no code for them.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from . import figure, page
from .picture import Picture, Prediction
from .recording import LayerAttention, Recording, record

__all__ = [
    "LayerAttention",
    "Picture",
    "Prediction",
    "Recording",
    "attention_figure",
    "attention_page",
    "record",
]


def attention_figure(
    model: nn.Module,
    image: Any,
    *,
    point: tuple[float, float] | None = None,
    layers: Sequence[str | int] | None = None,
    **settings: Any,
) -> Figure:
    """Draws, for a query point, its region, the regions it was routed to, and the attention's weights.

    Each layer gets two panels, drawn over the picture: the regions with the routing weights, and the weight
    of each key in the output at the query point, averaged over the heads. Down-sampled keys are drawn as
    equal parts of their region.

    Args:
        model: any module that holds a `BiLevelRoutingAttention` or an `nchwBRA`, or a `YOLO` of Ultralytics,
            whose predictions are drawn, too.
        image: one image, as the model takes it; see `record`.
        point: x and y in pixels: of the original picture if a `YOLO` letterboxes it, else of the network's
            input. By default the centre of the prediction with the highest confidence; if there is none, of
            the picture.
        layers: positions or names; all by default. "model.10" means every layer in that row of a `YOLO`.
        settings: further arguments of the model's call, such as `imgsz=640`.

    Returns:
        The figure: `figure.savefig("attention.png")` writes it, without a display.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Example:
        >>> from bra_triton import nchwBRA
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nchwBRA(32, num_heads=2, n_win=4))
        >>> shown = attention_figure(model, torch.rand(3, 128, 128), point=(20, 90))
        >>> len(shown.axes)  # regions, weights, and the scale of the weights
        3
    """
    recording = record(model, image, layers, **settings)
    picture = Picture.of(recording)
    return figure.draw(picture, recording.layers, picture.place(point))


def attention_page(
    model: nn.Module,
    image: Any,
    *,
    point: tuple[float, float] | None = None,
    layers: Sequence[str | int] | None = None,
    **settings: Any,
) -> str:
    """One HTML page, which loads no other file; it shows routing and weights for the point at the pointer.

    Arguments and errors are those of `attention_figure`; `point` is the first query point that the page
    shows. If there are more than 128 MiB of weights, a ValueError is raised.

    Returns:
        The page's text; write it to a file and open that in a browser (Chrome 80, Firefox 113, Safari 16.4 or
        newer).

    Example:
        >>> from bra_triton import nchwBRA
        >>> model = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nchwBRA(32, num_heads=2, n_win=4))
        >>> attention_page(model, torch.rand(3, 128, 128))[:15]
        '<!doctype html>'
    """
    recording = record(model, image, layers, **settings)
    picture = Picture.of(recording)
    return page.build(picture, recording.layers, picture.place(point))
