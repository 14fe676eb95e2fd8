"""The figure: for one query point its region, the regions that it was routed to, and the attention's weights.

It is drawn like figure 4 of Zhu et al., "BiFormer" (CVPR 2023). It needs matplotlib, but no display.
"""

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.typing import ColorType

from .picture import Picture
from .recording import LayerAttention

QUERY, ROUTED, PREDICTION = "#ff4136", "#2ee6d6", "#ffdc00"
BARS = (114 / 255,) * 3  # the grey with which Ultralytics letterboxes
VEIL = (0, 0, 0, 0.5)  # over regions that the query does not attend to
HEAT = "inferno"
PANEL_INCHES, TITLE_INCHES = 3.4, 0.6
OUTLINE = [withStroke(linewidth=2, foreground="black")]


def draw(picture: Picture, layers: list[LayerAttention], place: tuple[float, float]) -> Figure:
    """Draws two panels for every layer, beside the predictions if there are any.

    Args:
        picture: the picture under the drawings.
        layers: the layers; each gets a row of panels.
        place: the query point, x and y in pixels of the network's input.
    """
    first = int(bool(picture.predictions))
    widest = max(picture.extent(layer)[0] for layer in layers)
    highest = max(picture.extent(layer)[1] for layer in layers)
    row_inches = PANEL_INCHES * min(highest / widest, 1.6)
    rows, columns = len(layers), first + 2
    size = (columns * PANEL_INCHES + 0.6, rows * (row_inches + TITLE_INCHES) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    if first:
        _draw_predictions(axes[0, 0], picture, place)
        for below in axes[1:, 0]:
            below.axis("off")
    for layer, (routing, heat) in zip(layers, axes[:, first:], strict=True):
        _draw_routing(routing, picture, layer, place)
        _draw_heat(heat, picture, layer, place)
    handles = [
        Patch(facecolor="none", edgecolor=QUERY, label="region of the query point"),
        Patch(facecolor="none", edgecolor=ROUTED, label="regions it was routed to, with routing weight"),
        Patch(facecolor="white", edgecolor="grey", hatch="///", label="padding of the map"),
    ]
    shown = handles if any(layer.grid.is_padded for layer in layers) else handles[:-1]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)
    return figure


def regions_of(picture: Picture, layer: LayerAttention) -> Iterator[tuple[float, float, float, float]]:
    """Left, top, width and height of every region, row by row, in pixels of the network's input."""
    grid = layer.grid
    wide, high = (
        total / n for total, n in zip(picture.extent(layer), (grid.columns, grid.rows), strict=True)
    )
    for region in range(grid.n_regions):
        yield region % grid.columns * wide, region // grid.columns * high, wide, high


def _draw_predictions(axes: Axes, picture: Picture, place: tuple[float, float]) -> None:
    _draw_picture(axes, picture)
    for prediction in picture.predictions:
        x1, y1, x2, y2 = (picture.scale * side for side in prediction.box)
        left, top = picture.left + x1, picture.top + y1
        _draw_box(axes, (left, top, x2 - x1, y2 - y1), PREDICTION, 1.5)
        label = f"{prediction.label} {prediction.confidence:.2f}"
        axes.text(
            left, top, label, color=PREDICTION, fontsize=7, va="top", path_effects=OUTLINE, clip_on=True
        )
    _mark(axes, place)
    axes.set_title(f"predictions: {len(picture.predictions)}", fontsize=9)


def _draw_routing(axes: Axes, picture: Picture, layer: LayerAttention, place: tuple[float, float]) -> None:
    _draw_picture(axes, picture, layer)
    query, _ = picture.query(layer, place)
    routed, boxes = layer.r_idx[query].tolist(), [*regions_of(picture, layer)]
    for region, box in enumerate(boxes):
        _draw_box(axes, box, (1, 1, 1, 0.35), 0.4, "none" if region in (query, *routed) else VEIL)
    for region, weight in zip(routed, layer.r_weight[query].tolist(), strict=True):
        left, top, wide, high = boxes[region]
        _draw_box(axes, boxes[region], ROUTED, 1.6, (*to_rgb(ROUTED), 0.15))
        axes.text(
            left + wide / 2,
            top + high / 2,
            f"{weight:.2f}",
            color="white",
            fontsize=7,
            ha="center",
            va="center",
            path_effects=OUTLINE,
        )
    _draw_box(axes, boxes[query], QUERY, 2.2)
    _mark(axes, place)
    grid = layer.grid
    axes.set_title(
        f"{layer.name or '(the model)'}\n{grid.height} x {grid.width} tokens, {grid.rows} x {grid.columns} "
        f"regions, topk {layer.topk}",
        fontsize=8,
    )


def _draw_heat(axes: Axes, picture: Picture, layer: LayerAttention, place: tuple[float, float]) -> None:
    _draw_picture(axes, picture, layer, grey=True)
    heat = np.ma.masked_invalid(layer.heat(*picture.query(layer, place)).mean(0).numpy() * 100)
    wide, high = picture.extent(layer)
    shown = axes.imshow(
        heat,
        cmap=HEAT,
        vmin=0,
        extent=(0, wide, high, 0),
        interpolation="nearest",
        alpha=0.72,
        zorder=0.8,
    )
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.045, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    bar.ax.set_title("%", fontsize=6)
    _mark(axes, place)
    heads = "1 head" if layer.num_heads == 1 else f"mean of {layer.num_heads} heads"
    axes.set_title(f"attention of the query point\n{heads}, % for each key", fontsize=8)


def _draw_picture(
    axes: Axes, picture: Picture, layer: LayerAttention | None = None, grey: bool = False
) -> None:
    """Draws the picture, the bars of letterboxing around it, and beyond them the padding of the map."""
    pixels = picture.pixels.mean(axis=2) if grey else picture.pixels
    rows, columns = picture.pixels.shape[:2]
    right, bottom = picture.left + picture.scale * columns, picture.top + picture.scale * rows
    wide, high = picture.extent(layer) if layer else (picture.width, picture.height)
    axes.add_patch(
        Rectangle(
            (0, 0), wide, high, facecolor="white", edgecolor="grey", hatch="///", linewidth=0, zorder=0.4
        )
    )
    axes.add_patch(Rectangle((0, 0), picture.width, picture.height, facecolor=BARS, zorder=0.5))
    axes.imshow(
        pixels,
        cmap="gray",
        extent=(picture.left, right, bottom, picture.top),
        interpolation="bilinear",
        zorder=0.6,
    )
    axes.set(xlim=(0, max(wide, picture.width)), ylim=(max(high, picture.height), 0), xticks=[], yticks=[])
    axes.set_aspect("equal")


def _draw_box(
    axes: Axes,
    box: tuple[float, float, float, float],
    edge: ColorType,
    width: float,
    face: ColorType = "none",
) -> None:
    """Draws a rectangle; `box` is its left, top, width and height."""
    left, top, wide, high = box
    axes.add_patch(Rectangle((left, top), wide, high, edgecolor=edge, facecolor=face, linewidth=width))


def _mark(axes: Axes, place: tuple[float, float]) -> None:
    axes.plot(*place, "o", color=QUERY, markersize=5, markeredgecolor="white", markeredgewidth=1)
