"""The backends, in order of preference, and the one rule that picks among them.

A backend says why it cannot serve a problem, or None. `"auto"` takes the first that can and logs why those
before it could not; a backend asked for by name that cannot serve raises and says why.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ..kernels.grid import RegionGrid
from . import availability

logger = logging.getLogger("bra_triton")


@dataclass(frozen=True)
class Backend:
    """One way to compute the attention.

    Attributes:
        name: what users ask for.
        why_not: the reason why it cannot serve what `select` is given but for the name, or None.
        module: imported when first used; see `torch_backend` for the functions it must have. The empty name
            marks the reference, which is plain differentiable PyTorch and needs no operators.
    """

    name: str
    why_not: Callable[[Tensor, tuple[int, int], Sequence[RegionGrid], bool], str | None]
    module: str


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", availability.why_not_triton, ".triton_backend"),
        Backend("torch", availability.always, ".torch_backend"),
        Backend("reference", availability.always, ""),
    )
}
AUTO = "auto"
_logged: set[str] = set()


def check_name(name: str) -> str:
    """Returns `name`; raises ValueError if it is neither `"auto"` nor a backend's."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"backend must be one of {(AUTO, *BACKENDS)}, got {name!r}")
    return name


def select(
    name: str, x: Tensor, head_dims: tuple[int, int], grids: Sequence[RegionGrid], routes: bool = True
) -> str:
    """Name of the backend that serves.

    Args:
        name: `"auto"` or a backend's name.
        x: a tensor of the device and dtype in question.
        head_dims: channels of a query or key, and of a value, in one head.
        grids: the maps and their regions.
        routes: whether regions are chosen, not given.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the named backend cannot serve; says why.
    """
    if check_name(name) != AUTO:
        reason = BACKENDS[name].why_not(x, head_dims, grids, routes)
        if reason:
            raise RuntimeError(f"backend={name!r} cannot serve: {reason}; backend='auto' picks one that can")
        return name
    for backend in BACKENDS.values():
        reason = backend.why_not(x, head_dims, grids, routes)
        if reason is None:
            return backend.name
        _log_once(f"backend {backend.name!r} is passed over: {reason}")
    raise AssertionError("the torch backend serves everything")


@cache
def load(name: str) -> ModuleType:
    """The module that implements a backend's operators."""
    return importlib.import_module(BACKENDS[name].module, __package__)


def _log_once(message: str) -> None:
    # torch.compile cannot trace a logger; the choice itself it can.
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.info(message)
