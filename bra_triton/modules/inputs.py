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


def for_keeping(x: Tensor, layer: Any) -> Tensor:
    """A copy of a map for a linear layer to keep for its gradient: the caller may change `x` in place.

    It is `x` itself where the layer keeps nothing, or a copy that it makes anyway, for the map's strides or
    its dtype; where `x` is a leaf that learns, which autograd lets nobody change in place; and in a graph
    that is recorded, whose every run would pay for the copy.
    """
    if not torch.is_grad_enabled() or not is_eager() or (x.requires_grad and x.is_leaf):
        return x
    if not _folds(x) or not any(parameter.requires_grad for parameter in layer.parameters()):
        return x
    kind = x.device.type
    in_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x if in_autocast and x.dtype == torch.float32 else x.clone()


def _folds(x: Tensor) -> bool:
    """Whether a map `(N, H, W, C)` is one of rows, `(N*H*W, C)`, without being copied."""
    following = None
    for size, stride in zip(reversed(x.shape[:3]), reversed(x.stride()[:3]), strict=True):
        if size != 1:
            if following is not None and stride != following:
                return False
            following = size * stride
    return True


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
