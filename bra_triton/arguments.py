"""Checks of single arguments; an error names the argument, its value and what is allowed."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .export import is_eager

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Its product with log2(e), which kernels take, must be finite in float32.
LARGEST_SCALE = 1e38


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it is an int of at least `least`, NumPy's too, or a size of a graph that is being recorded."""
    if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and not is_eager()):
        return True
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def whole(name: str, value: Any, least: int = 1) -> int:
    """An int of at least `least`, which may come as NumPy's.

    Raises:
        ValueError: if it is none; a bool is none.
    """
    if not is_whole(value, least):
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else value


def whole_pair(name: str, value: Any) -> tuple[int, int]:
    """Two ints of at least 1, in a tuple or a list.

    Raises:
        ValueError: if it is none.
    """
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if not is_pair or not all(is_whole(side) for side in value):
        raise ValueError(f"{name} must be two ints of at least 1, got {value!r}")
    return whole(name, value[0]), whole(name, value[1])


def windows(name: str, value: Any) -> int | tuple[int, int]:
    """How many regions a map is cut into: a side, or along its height and its width where they differ.

    Raises:
        ValueError: if it is neither an int of at least 1 nor two of them.
    """
    if not isinstance(value, tuple | list):
        return whole(name, value)
    rows, columns = whole_pair(name, value)
    return rows if rows == columns else (rows, columns)


def flag(name: str, value: Any) -> bool:
    """A bool, or 0 or 1 in its place.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def factor(name: str, value: Any) -> float:
    """A finite number other than 0; a number of a graph that is being recorded as it is.

    Raises:
        TypeError: for a tensor, to which no gradient would flow.
        ValueError: if it is none.
    """
    is_tensor = isinstance(value, Tensor)
    if not is_eager() and (isinstance(value, torch.SymFloat) or (is_tensor and not value.requires_grad)):
        return value
    if is_tensor:
        raise TypeError(
            f"{name} must be a Python number, got a {type(value).__name__}, which would get no gradient: "
            "multiply the queries by it instead"
        )
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not 0 < abs(value) <= LARGEST_SCALE:
        raise ValueError(f"{name} must be a number from -1e38 to 1e38 other than 0, got {value!r}")
    return float(value)


def at_least_one(name: str, value: Any) -> float:
    """A finite number of at least 1, whole or not.

    Raises:
        ValueError: if it is none.
    """
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not 1 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 1, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed strings.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
    return value


def dense_floats(name: str, x: Any) -> Tensor:
    """A dense tensor of one of the `FLOATS`.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if its dtype or layout is another.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {x!r}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided), got {x.layout}")
    return x
