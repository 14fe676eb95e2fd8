"""The backends, in order of preference, and the one rule that picks among them.

`"auto"` takes the first that can serve and logs why those before it could not; a backend asked for by name
that cannot serve raises and says why. Only the reference calls a router or a pooling layer: where one must be
called, because it has a hook or was replaced, the reference serves whatever was asked for, and a warning is
logged. While a graph is exported, the form for exports stands in for the fused backends, whose operators no
exported graph can hold.
"""

import logging

import torch

from ..arguments import one_of
from ..call import Request
from ..export import being_exported
from ..reference import ReferenceBackend
from .exported import ExportedBackend
from .fused import FusedBackend
from .protocol import Backend

logger = logging.getLogger("bra_triton")

AUTO = "auto"
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (FusedBackend("triton"), FusedBackend("torch"), ReferenceBackend())
}
_EXPORTED: Backend = ExportedBackend()
_logged: set[str] = set()


def check_name(name: str) -> str:
    """Returns `name`; raises ValueError if it is neither `"auto"` nor a backend's."""
    return one_of("backend", name, (AUTO, *BACKENDS))


def select(name: str, request: Request) -> Backend:
    """The backend that serves.

    Args:
        name: `"auto"` or a backend's name.
        request: the call in question.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the named backend cannot serve; says why.
    """
    check_name(name)
    if request.calls:  # also where a backend is named: profilers put hooks on every layer
        _log_once(
            f"calling {request.calls}, which is hooked or was replaced, takes backend 'reference', which "
            "gathers keys and values",
            logging.WARNING,
        )
        return BACKENDS[ReferenceBackend.name]
    if being_exported() and name != ReferenceBackend.name:
        return _EXPORTED
    if name != AUTO:
        reason = BACKENDS[name].why_not(request)
        if reason:
            raise RuntimeError(f"backend={name!r} cannot serve: {reason}; backend='auto' picks one that can")
        return BACKENDS[name]
    for backend in BACKENDS.values():
        reason = backend.why_not(request)
        if reason is None:
            return backend
        _log_once(f"backend {backend.name!r} is passed over: {reason}", logging.INFO)
    raise AssertionError("the torch backend serves everything")


def _log_once(message: str, level: int) -> None:
    # torch.compile cannot trace a logger; the choice itself it can.
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.log(level, message)
