"""What the modules have in common in taking a map."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..export import is_eager


def check_shape(x: Tensor, axes: str, channel_axis: int, dim: int) -> None:
    """Raises ValueError where `x` is no map with `dim` channels."""
    if x.dim() != 4 or x.shape[channel_axis] != dim:
        raise ValueError(f"x must be {axes} with dim={dim}, got shape {tuple(x.shape)}")


def for_keeping(x: Tensor) -> Tensor:
    """A copy of a map for a linear layer to keep for its gradient: the caller may change `x` in place.

    It is `x` itself where the layer keeps nothing, or copies it anyway, for its strides or its dtype; where
    it is a leaf that learns, which PyTorch lets nobody change in place; and where a graph is recorded, which
    has no changes in place.
    """
    if not torch.is_grad_enabled() or not x.is_contiguous() or (x.requires_grad and x.is_leaf):
        return x
    if not is_eager() or (x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)):
        return x
    return x.clone()


def apply(name: str, layer: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor] | None = None) -> Any:
    """`run(layer, x)`, by default `layer(x)`; if that fails, says in which layer.

    Raises:
        RuntimeError: the layer's own, with its name. Errors of a class derived from it stay as they are:
            callers look for the one that says that memory ran out.
    """
    try:
        return layer(x) if run is None else run(layer, x)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise RuntimeError(f"{name} fails on a map {tuple(x.shape)}: {error}") from error


def project(name: str, layer: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor] | None = None) -> Any:
    """`apply`; if that fails because `x` is unlike the parameters, says so.

    Raises:
        ValueError: naming `x` and what it must be.
    """
    try:
        return apply(name, layer, x, run)
    except RuntimeError as error:
        parameter = next(layer.parameters(), x)
        for kind in ("device", "layout", "dtype"):
            given, expected = getattr(x, kind), getattr(parameter, kind)
            if given != expected:
                raise ValueError(f"x must have the parameters' {kind}, {expected}, got {given}") from error
        raise
