"""Pictures of what the attention looks at: routed regions and weights, of any model that holds the modules.

`attention_figure` makes a figure for one query point, `attention_page` a page in which the pointer is the
query point, and `record` has the numbers behind both. They need matplotlib (`pip install matplotlib`;
Ultralytics brings it). The modules' own forward does nothing for them.
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
    """For a query point: its region, the regions it was routed to, and the attention's weights.

    Two panels for each layer, over the picture: the regions with the routing weights, and the weights with
    which each key enters the output at the query point, averaged over the heads. Down-sampled keys are drawn
    as equal parts of their region.

    Args:
        model: any module that holds a `BiLevelRoutingAttention` or an `nchwBRA`, or a `YOLO` of Ultralytics,
            whose predictions are drawn beside.
        image: one image, as the model takes it; see `record`.
        point: x and y in pixels: of the original picture where a `YOLO` letterboxes it, else of the network's
            input. By default the centre of the surest prediction, or of the picture.
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
    """One HTML page, without anything to load, that shows routing and weights where the pointer is.

    Arguments and errors are those of `attention_figure`; `point` is where the page begins. A page of more
    than 128 MiB of weights is refused with a ValueError.

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
