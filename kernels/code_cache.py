"""A temporary cache of compiled kernels, for when the folder of Triton's own cannot be written.

The process removes it at its end. Triton reads from its cache what it has just compiled, so that without one
no kernel can be launched.
"""

import logging
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import triton

T = TypeVar("T")

logger = logging.getLogger(__name__)


def compiling(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls a function that compiles before it launches; once more with a temporary cache where that fails.

    One launch at a time: others before it may have added to what they were given, and must not do so twice.

    Raises:
        OSError: if the function fails for another reason, or there is no room for temporary files either.
    """
    try:
        return function(*arguments, **options)
    except OSError as error:
        _warn_once(triton.knobs.cache.dir, error.strerror or str(error))
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = _folder().name
            return function(*arguments, **options)


@cache
def _warn_once(folder: str, reason: str) -> None:
    logger.warning(
        f"compiling kernels for Triton's cache {folder} failed: {reason}; this process keeps them in "
        f"{_folder().name}. Set TRITON_CACHE_DIR to a folder that can be written."
    )


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bra_triton_")
