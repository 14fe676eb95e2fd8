"""Checks of single arguments; an error names the argument, its value and what is allowed."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .export import is_eager

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Kernels multiply a scale by log2(e). The product must be finite in float32.
LARGEST_SCALE = 1e38
_SEQUENCES = (tuple, list)  # PyTorch 2.8 cannot compile `isinstance(value, tuple | list)`


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether `value` is an int of at least `least`, Python's or NumPy's, or a size in a recorded graph."""
    if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and not is_eager()):
        return True
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def is_real(value: Any) -> bool:
    """Whether `value` is a real number, Python's or NumPy's, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int = 1) -> int:
    """Returns `value` as a Python int if it is an int of at least `least`, Python's or NumPy's.

    Raises:
        ValueError: if it is anything else, such as a bool.
    """
    if not is_whole(value, least):
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else value


def whole_pair(name: str, value: Any) -> tuple[int, int]:
    """Returns `value` as a tuple if it is a tuple or list of two ints of at least 1.

    Raises:
        ValueError: if it is anything else.
    """
    is_pair = isinstance(value, _SEQUENCES) and len(value) == 2
    if not is_pair or not all(is_whole(side) for side in value):
        raise ValueError(f"{name} must be two ints of at least 1, got {value!r}")
    return whole(name, value[0]), whole(name, value[1])


def windows(name: str, value: Any) -> int | tuple[int, int]:
    """Returns the number of regions along each side of a map, or a pair if height and width differ.

    Raises:
        ValueError: if it is neither an int of at least 1 nor two of them.
    """
    if not isinstance(value, _SEQUENCES):
        return whole(name, value)
    rows, columns = whole_pair(name, value)
    return rows if rows == columns else (rows, columns)


def flag(name: str, value: Any) -> bool:
    """Returns `value` as a bool if it is a bool, 0 or 1.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def factor(name: str, value: Any) -> float:
    """Returns `value` as a float if it is a number from -1e38 to 1e38 other than 0.

    A number of a graph that is being recorded is returned unchanged.

    Raises:
        TypeError: if it is a tensor, because it would get no gradient.
        ValueError: if it is anything else.
    """
    is_tensor = isinstance(value, Tensor)
    if not is_eager() and (isinstance(value, torch.SymFloat) or (is_tensor and not value.requires_grad)):
        return value
    if is_tensor:
        raise TypeError(
            f"{name} must be a Python number, got a {type(value).__name__}, which would get no gradient: "
            "multiply the queries by it instead"
        )
    if not is_real(value) or not 0 < abs(value) <= LARGEST_SCALE:
        raise ValueError(f"{name} must be a number from -1e38 to 1e38 other than 0, got {value!r}")
    return float(value)


def at_least_one(name: str, value: Any) -> float:
    """Returns `value` as a float if it is a finite number of at least 1, whole or not.

    Raises:
        ValueError: if it is anything else.
    """
    if not is_real(value) or not 1 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 1, got {value!r}")
    return float(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Returns `value` if it is one of the allowed strings.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")
    return value


def dense_floats(name: str, x: Any) -> Tensor:
    """Returns `x` if it is a dense tensor of one of the dtypes `FLOATS`.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if its dtype or layout is a different one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {x!r}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    check_dense(name, x)
    return x


def check_dense(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor of another layout; a nested tensor, too, says that it is strided."""
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise ValueError(f"{name} must be dense (torch.strided), got {kind}")
