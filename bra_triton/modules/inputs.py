"""What the modules have in common in taking a map, and in what they let be set."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..spec import AttentionSpec


class FixedScale(nn.Module):
    """A module whose scale is a number of its specification, and is no parameter.

    Attributes:
        spec: what is computed.
    """

    spec: AttentionSpec

    @property
    def scale(self) -> float:
        """Factor of the logits; setting it raises TypeError."""
        return self.spec.scale

    @scale.setter
    def scale(self, value: Any) -> None:
        raise TypeError(
            f"scale must be given to the constructor as qk_scale, a number, got {type(value).__name__}; "
            "a parameter would get no gradient: multiply the queries by it instead"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            # nn.Module would make a parameter or a submodule of it, which nothing reads.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def check_shape(x: Any, axes: str, channel_axis: int, dim: int) -> None:
    """Raises TypeError where `x` is no tensor, ValueError where it is no map with `dim` channels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {x!r}")
    if x.dim() != 4 or x.shape[channel_axis] != dim:
        raise ValueError(f"x must be {axes} with dim={dim}, got shape {tuple(x.shape)}")


def project(layer: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Tensor:
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
