"""A stand-in for Triton's cache of compiled kernels, for when its folder cannot be written.

Triton reads from its cache what it has just compiled, so that without one no kernel can be launched.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import triton

logger = logging.getLogger(__name__)


@contextmanager
def elsewhere(error: OSError) -> Iterator[None]:
    """Context in which Triton compiles into a temporary folder, which this process removes at its end.

    Args:
        error: what compiling has raised, for the warning that names it and both folders.

    Raises:
        OSError: if there is no room for temporary files either.
    """
    _warn_once(triton.knobs.cache.dir, error.strerror or str(error))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = _folder().name
        yield


@cache
def _warn_once(folder: str, reason: str) -> None:
    logger.warning(
        f"compiling kernels for Triton's cache {folder} failed: {reason}; this process keeps them in "
        f"{_folder().name}. Set TRITON_CACHE_DIR to a folder that can be written."
    )


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bra_triton_")
