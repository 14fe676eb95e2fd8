"""The backends in order of preference, and the rule that picks one of them.

`"auto"` takes the first backend that can serve the call, and logs why those before it cannot. If a backend is
asked for by name and cannot serve, `select` raises an error that says why. Only the reference calls a router
or a pooling layer. If such a layer must be called, because it has a hook or was replaced, the reference
serves the call, whichever backend was asked for, and a warning is logged. While a graph is exported,
`ExportedBackend` stands in for the fused backends, because an exported graph cannot hold their operators.
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
    """Picks the backend that serves a call.

    Args:
        name: `"auto"` or a backend's name.
        request: the call.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the named backend cannot serve; the message says why.
    """
    check_name(name)
    # Also if another backend was named: profilers put hooks on every layer, and must not make calls fail.
    if request.calls:
        _log_once(
            "backend 'reference', which gathers keys and values, is used: only it calls a router or kv_down "
            f"that has a hook or was replaced, here {request.calls}",
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
        _log_once(f"backend {backend.name!r} is skipped: {reason}", logging.INFO)
    raise AssertionError("the torch backend serves everything")


def _log_once(message: str, level: int) -> None:
    # torch.compile can trace the choice of a backend, but not a logger.
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.log(level, message)
