"""Turns autocast off inside a computation, where it would round float32 statistics to half precision."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")
_KINDS = ("cpu", "cuda", "mps", "xpu")


def outside_autocast(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorator: runs the function with autocast off."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # Turning autocast off where it is off already would cost 6 us in every call.
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for kind in _KINDS:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run
