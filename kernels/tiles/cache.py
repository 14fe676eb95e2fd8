"""The user's own cache of tile configurations: what `bra-autotune` measured on this machine's cards.

One file, `tuned.json`, serves all cards and versions. An entry is used only on a card of the same name, with
the same versions of PyTorch and Triton, and with the same kernel sources as those it was measured with. No
content of the file can stop a launch: entries that cannot be used are ignored, with one warning.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import sources
from .table import Entry, Key, entry_row, format_rows, parse_entry, require

logger = logging.getLogger(__name__)
_FORMAT = 1
_warned: set[str] = set()


def folder() -> Path:
    """`$BRA_TRITON_CACHE`, else `bra_triton` in the user's cache folder."""
    if given := os.environ.get("BRA_TRITON_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bra_triton")


def path() -> Path:
    """Path of the cache's file."""
    return folder() / "tuned.json"


def circumstances(card: str, kernel: str) -> dict[str, str]:
    """The card, versions and kernel source that an entry must have been measured with to be used here."""
    versions = {"torch": torch.__version__, "triton": triton_version()}
    return {"card": card, **versions, "source": source_digest(kernel)}


def triton_version() -> str:
    """Version of Triton; an empty string if it is not installed."""
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


@cache
def source_digest(kernel: str) -> str:
    """Digest of the source of a kernel and of what it imports; tiles measured with another are not used."""
    return sources.digest(f"attention/{kernel}.py")


def read(card: str) -> dict[Key, Entry]:
    """The entries measured on cards of this name, with these versions and kernels; may be empty."""
    rows = _read_rows(path())
    entries = {}
    for row in rows:
        key, entry = parse_entry(row)
        if circumstances(card, key.kernel).items() <= row.items():
            entries[key] = entry
    if rows and not entries:
        _warn(
            f"{path()} holds nothing measured on {card} with torch {torch.__version__}, Triton "
            f"{triton_version()} and these kernels; using the shipped tiles (bra-autotune measures anew)"
        )
    return entries


def update(card: str, entries: Mapping[Key, Entry]) -> None:
    """Adds entries and replaces those of the same card, versions and key; safe beside other processes.

    Raises:
        OSError: if the folder cannot be written.
    """
    path().parent.mkdir(parents=True, exist_ok=True)
    with _lock():
        rows = {_identity(row): row for row in _read_rows(path())}
        for key, entry in entries.items():
            row = circumstances(card, key.kernel) | entry_row(key, entry)
            rows[_identity(row)] = row
        write_whole(path(), format_rows({"format": _FORMAT}, list(rows.values())))


def write_whole(target: Path, text: str) -> None:
    """Replaces a file in one step, so that no reader sees a half-written one."""
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.replace(file.name, target)
    except OSError:
        os.unlink(file.name)
        raise


def _read_rows(source: Path) -> list[dict[str, Any]]:
    """All entries of the file, checked; none if the file is missing or any part of it is unreadable."""
    try:
        content = json.loads(source.read_text())
        require(content, "the cache of tiles", {"format": (int,), "entries": (list,)})
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        rows: list[dict[str, Any]] = content["entries"]
        for row in rows:
            parse_entry(row)
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        _warn(f"ignoring {source}, which is no readable cache of tiles: {error}")
        return []


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("card", "torch", "triton", "source", "kernel", "bits", "head_dim", "size", "form")
    return tuple(row.get(name) for name in names)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


@contextmanager
def _lock() -> Iterator[None]:
    # Imported here because it exists on Unix only. The system releases the lock of a process that dies.
    import fcntl

    with open(path().with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
