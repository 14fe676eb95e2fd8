"""What the modules have in common in taking a map."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def check_shape(x: Tensor, axes: str, channel_axis: int, dim: int) -> None:
    """Raises ValueError where `x` is no map with `dim` channels."""
    if x.dim() != 4 or x.shape[channel_axis] != dim:
        raise ValueError(f"x must be {axes} with dim={dim}, got shape {tuple(x.shape)}")


def project(layer: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
    """`run(layer, x)`, by default `layer(x)`; if that fails because `x` is unlike the parameters, says so.

    Raises:
        ValueError: naming `x` and what it must be.
    """
    try:
        return layer(x) if run is None else run(layer, x)
    except RuntimeError as error:
        parameter = next(layer.parameters(), x)
        for kind in ("device", "layout", "dtype"):
            given, expected = getattr(x, kind), getattr(parameter, kind)
            if given != expected:
                raise ValueError(f"x must have the parameters' {kind}, {expected}, got {given}") from error
        raise
