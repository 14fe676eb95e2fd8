"""A temporary cache of compiled kernels, for use when the folder of Triton's own cache cannot be written.

Without a cache no kernel could be launched: Triton writes a compiled kernel to its cache and then reads it
from there. The process deletes the temporary cache when it ends.
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
    """Calls `function`, which compiles a kernel; if that fails, calls it again with a temporary cache.

    `function` must launch at most one kernel, after compiling it. An earlier launch could have added to an
    array in place, and the second call would add again.

    Raises:
        OSError: if `function` fails for another reason, or no temporary files can be written either.
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
