"""How the drop-in modules take a map: a check of its shape, a copy if needed, layers with clear errors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_dense
from ..export import is_eager


def check_shape(x: Tensor, axes: str, channel_axis: int, dim: int) -> None:
    """Raises ValueError unless `x` is dense, with four axes, `axes`, and `dim` channels."""
    check_dense("x", x)
    if x.dim() != 4 or x.shape[channel_axis] != dim:
        raise ValueError(f"x must be {axes} with dim={dim}, got shape {tuple(x.shape)}")


def for_keeping(x: Tensor, layer: Any) -> Tensor:
    """A copy of a map `(N, H, W, C)` for a linear layer, which keeps its input for the backward.

    The caller may then change `x` in place before the backward. `x` itself is returned if
    - the layer keeps nothing, because no gradient of its parameters is needed;
    - the layer makes a copy anyway, because of the strides of `x` or its dtype (autocast);
    - `x` is a leaf that requires a gradient: autograd forbids to change it in place;
    - a graph is being recorded: each of its runs would pay for the copy.
    """
    if not torch.is_grad_enabled() or not is_eager() or (x.requires_grad and x.is_leaf):
        return x
    if not _folds(x) or not any(parameter.requires_grad for parameter in layer.parameters()):
        return x
    kind = x.device.type
    in_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x if in_autocast and x.dtype == torch.float32 else x.clone()


def _folds(x: Tensor) -> bool:
    """Whether a map `(N, H, W, C)` can be viewed as `(N*H*W, C)`, without a copy."""
    following = None
    for size, stride in zip(reversed(x.shape[:3]), reversed(x.stride()[:3]), strict=True):
        if size != 1:
            if following is not None and stride != following:
                return False
            following = size * stride
    return True


def apply(name: str, layer: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor] | None = None) -> Any:
    """Returns `run(layer, x)`, by default `layer(x)`; if the layer fails, the error contains `name`.

    Raises:
        RuntimeError: the layer's error, with `name` before its text. Errors of derived classes pass
            unchanged, because callers look for `torch.OutOfMemoryError` by its class.
    """
    try:
        return layer(x) if run is None else run(layer, x)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise RuntimeError(f"{name} fails on a map {tuple(x.shape)}: {error}") from error


def project(name: str, layer: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor] | None = None) -> Any:
    """Does what `apply` does, with a clearer error if `x` does not suit the layer's parameters.

    Raises:
        ValueError: if the layer fails and `x` does not have the parameters' device, layout or dtype.
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
