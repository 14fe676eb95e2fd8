"""The user's own cache of tile configurations: what `bra-autotune` measured on this machine's cards.

One file, `tuned.json`, serves all cards and versions. An entry is used only on a card of the same name, with
the same versions of PyTorch and Triton, and with the same kernel sources as those with which it was measured.
The content of the file can never stop a launch: entries that cannot be used are ignored, with one warning. No
content is lost either: an update keeps entries that this version does not understand, and renames a file that
it does not understand before it begins a new one.
"""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch

from . import sources
from .table import KERNELS, Entry, Key, entry_row, format_rows, parse_entry, require

logger = logging.getLogger(__name__)
# The largest file that is read, in bytes. All entries of one card and one set of versions take 0.1 MiB;
# reading 8 MiB takes a second.
LARGEST = 8 << 20
_FORMAT = 1
_CIRCUMSTANCES = ("card", "torch", "triton", "source")
# Errors of reading, parsing and writing if a file is not a cache of this version; deeply nested JSON raises
# the last.
_NOT_UNDERSTOOD = (OSError, ValueError, RecursionError)
_warned: set[str] = set()


def folder() -> Path:
    """The folder of the cache: `$BRA_TRITON_CACHE`, else `bra_triton` in the user's cache folder.

    If that folder is in the home folder and there is no home folder: `bra_triton` in the system's folder for
    temporary files, with a warning.

    Raises:
        FileNotFoundError: if there is no folder for temporary files either.
    """
    given = os.environ.get("BRA_TRITON_CACHE")
    try:
        return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "bra_triton")).expanduser()
    except RuntimeError as error:
        fallback = Path(tempfile.gettempdir(), "bra_triton")
        _warn(f"no home folder ({error}); the cache of tiles is {fallback / 'tuned.json'}")
        return fallback


def path() -> Path:
    """Path of the cache's file."""
    return folder() / "tuned.json"


def circumstances(card: str, kernel: str) -> dict[str, str]:
    """The card, versions and kernel source that an entry must have been measured with to be used here."""
    # `torch.__version__` is an instance of a subclass of str; an entry that was read has a plain str.
    versions = {"torch": str(torch.__version__), "triton": triton_version()}
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
    """Digest of a kernel's source and of what it imports; tiles measured with another digest are not used."""
    return sources.digest(f"attention/{kernel}.py")


def read(card: str) -> dict[Key, Entry]:
    """The entries measured on cards of this name, with these versions and kernels; may be empty."""
    try:
        source = path()
        rows = _read_content(source)["entries"]
    except FileNotFoundError:
        return {}
    except _NOT_UNDERSTOOD as error:
        _warn(f"ignoring {source}, which is not a readable cache of tiles: {error}")
        return {}
    here = {kernel: circumstances(card, kernel) for kernel in KERNELS}
    entries, refusals = {}, []
    for row in rows:
        try:
            key, entry = _parse(row)
        except _NOT_UNDERSTOOD as error:
            refusals.append(str(error))
            continue
        if here[key.kernel].items() <= row.items():
            entries[key] = entry
    if refusals:
        _warn(
            f"ignoring {len(refusals)} of {len(rows)} entries of {source}; the first one because: "
            f"{refusals[0]}"
        )
    elif rows and not entries:
        _warn(
            f"{source} holds nothing measured on {card} with torch {torch.__version__}, Triton "
            f"{triton_version()} and these kernels; using the shipped tiles (run bra-autotune to measure)"
        )
    return entries


def update(card: str, entries: Mapping[Key, Entry]) -> None:
    """Adds entries, in place of those with the same key and circumstances; safe beside other processes.

    A file that is not understood, or that would become too large to be read, is renamed to `tuned.1.json` (or
    the next free number), with a warning.

    Raises:
        OSError: if the folder cannot be written.
    """
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [circumstances(card, key.kernel) | entry_row(key, entry) for key, entry in entries.items()]
    with _lock():
        try:
            text = _merged(target, rows)
        except FileNotFoundError:
            text = format_rows({"format": _FORMAT}, rows)
        except _NOT_UNDERSTOOD as error:
            names = (target.with_suffix(f".{number}.json") for number in count(1))
            aside = next(name for name in names if not name.exists())
            target.rename(aside)
            _warn(
                f"{target} cannot be extended ({error}); it was renamed to {aside.name}, and a new file is "
                "written"
            )
            text = format_rows({"format": _FORMAT}, rows)
        write_whole(target, text)


def write_whole(target: Path, text: str) -> None:
    """Replaces a file in one step, so that no reader sees a half-written one."""
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:  # a full disk, an interrupt
            os.unlink(file.name)
            raise


def _read_content(source: Path) -> dict[str, Any]:
    """The file's JSON object, its entries not checked yet.

    Raises:
        FileNotFoundError: if there is no file.
        OSError, ValueError, RecursionError: if the file as a whole is not understood.
    """
    if source.exists() and not source.is_file():  # a pipe would keep the launch waiting
        raise ValueError("it is not a file")
    with source.open("rb") as file:
        text = file.read(LARGEST + 1)
    _check_size(len(text))
    content = json.loads(text)
    require(content, "the cache of tiles", {"format": (int,), "entries": (list,)})
    if content["format"] != _FORMAT:
        raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
    return content


def _merged(source: Path, new: list[dict[str, Any]]) -> str:
    """The file's text with new entries; entries that are not understood stay. Raises like `_read_content`."""
    content = _read_content(source)
    replaced = {_identity(row) for row in new}
    kept = [row for row in content.pop("entries") if _identity(row) not in replaced]
    text = format_rows(content, kept + new)
    _check_size(len(text))
    return text


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB")


def _parse(row: Any) -> tuple[Key, Entry]:
    require(row, "an entry", dict.fromkeys(_CIRCUMSTANCES, (str,)))
    return parse_entry(row)


def _identity(row: Any) -> tuple[Any, ...] | None:
    """Key and circumstances: an update replaces entries in which both are equal. None if not understood."""
    try:
        key, _ = _parse(row)
    except _NOT_UNDERSTOOD:
        return None
    return key, *(row[name] for name in _CIRCUMSTANCES)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message if len(message) < 1000 else f"{message[:1000]} ...")


def _lock() -> AbstractContextManager[Any]:
    # Imported here, because only an update needs it. PyTorch requires this package. If a process dies, the
    # system releases its lock.
    from filelock import FileLock

    return FileLock(path().with_suffix(".lock"))
