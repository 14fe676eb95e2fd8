"""Which tile configuration a launch gets.

A kernel "owns" a tile of rows (queries for the forward and dQ, keys for dK/dV) and walks a list in steps of
the other side. Rows past the end of a region are wasted, so the owned tile shrinks with the region.

What was measured on this very card (`bra-autotune`, kept in the user's cache) comes first, then the table
that the package ships for the card's architecture or the nearest older one, read at the first launch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from ..lib.integers import next_power_of_2
from . import cache as tile_cache
from .table import (
    FORWARD,
    KEY_VALUE_GRADIENT,
    PADDED,
    PLAIN,
    QUERY_GRADIENT,
    WEIGHTED,
    Key,
    Tile,
    nearest,
    packaged,
    packaged_archs,
)

# What tensors stand for that lie on no GPU: those of the interpreter, and those without data.
DEFAULT_ARCHITECTURE = "sm_90"
_architecture: ContextVar[str | None] = ContextVar("architecture", default=None)
_forced: ContextVar[Mapping[str, Tile]] = ContextVar("forced", default={})  # noqa: B039 (never written to)

# Masked attention over the whole map, half precision, heads of at most 32: of eleven, timed by hand on an
# H200 at BiFormer's third stage, the fastest; but dK/dV's (128 x 64, by 6 %) spills under Triton 3.8.
MASKED = {
    FORWARD: Tile(64, 64, 4, 2),
    QUERY_GRADIENT: Tile(64, 64, 4, 2),
    KEY_VALUE_GRADIENT: Tile(128, 32, 4, 2),
}


def channel_block(head_dim: int) -> int:
    """Channels that a tile holds for a head of `head_dim`: a power of two that a matrix unit can take."""
    return max(16, next_power_of_2(head_dim))


def choose(
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    region_tokens: int,
    device: torch.device,
    form: str = PLAIN,
) -> Tile:
    """The tile for a problem.

    Args:
        kernel: `FORWARD`, `QUERY_GRADIENT` or `KEY_VALUE_GRADIENT`.
        dtype: float32, float16 or bfloat16.
        head_dim: the wider of a head's queries and values, at most 256.
        region_tokens: tokens in a region, `S`.
        device: where the tensors lie; see `use_architecture` for those that lie on no GPU.
        form: see `Key`.
    """
    if tile := _forced.get().get(kernel):
        return tile
    key = Key.of(kernel, 8 * dtype.itemsize, head_dim, region_tokens, form)
    arch = _architecture.get()
    if arch is None and device.type == "cuda":
        return _of_card(torch.cuda.current_device() if device.index is None else device.index)[key]
    return _of_architecture(arch or DEFAULT_ARCHITECTURE)[key]


def form_of(heads: tuple[int, int], is_padded: bool, n_graphs: int, is_weighted: bool) -> str:
    """The form of a kernel, see `Key`.

    Args:
        heads: channels of a query and of a value in one head.
        is_padded: whether keys and values have padding.
        n_graphs: graphs an image.
        is_weighted: whether there is a factor, or its gradient is asked for.
    """
    if is_weighted:
        return WEIGHTED
    narrow = any(channel_block(head_dim) != head_dim for head_dim in heads)
    return PADDED if is_padded or narrow or n_graphs > 1 else PLAIN


@contextmanager
def use_architecture(arch: str) -> Iterator[None]:
    """Within it, launches of this thread get the tiles that the package ships for `arch`.

    For what runs on no GPU, and stands for one: a recording or the interpreter.

    Raises:
        ValueError: `arch` is no architecture's name.
    """
    nearest(arch, packaged_archs())
    token = _architecture.set(arch)
    try:
        yield
    finally:
        _architecture.reset(token)


@contextmanager
def use_tiles(by_kernel: Mapping[str, Tile]) -> Iterator[None]:
    """Within it, launches of this thread get these tiles; kernels not named get their own."""
    token = _forced.set(by_kernel)
    try:
        yield
    finally:
        _forced.reset(token)


InForce = tuple[str | None, tuple[tuple[str, Tile], ...]]


def in_force() -> InForce | None:
    """What `use_architecture` and `use_tiles` have set in this thread; None for nothing."""
    forced, arch = _forced.get(), _architecture.get()
    return (arch, tuple(forced.items())) if forced or arch else None


@contextmanager
def restored(what: InForce) -> Iterator[None]:
    """Within it, in another thread, what was `in_force`."""
    arch, forced = what
    tokens = _architecture.set(arch), _forced.set(dict(forced))
    try:
        yield
    finally:
        _architecture.reset(tokens[0])
        _forced.reset(tokens[1])


def architecture_of(device: torch.device) -> str:
    """Architecture of a GPU: "sm_90", "gfx942"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# Called when the tables are forgotten, by `forget`: they drop what was made from them.
when_forgotten: list[Callable[[], None]] = []


def forget() -> None:
    """Reads all tables anew at the next launch: for whoever has just written one."""
    _of_card.cache_clear()
    _of_architecture.cache_clear()
    packaged.cache_clear()
    for drop in when_forgotten:
        drop()


@cache
def _of_card(index: int) -> dict[Key, Tile]:
    device = torch.device("cuda", index)
    measured = tile_cache.read(torch.cuda.get_device_name(device))
    return _of_architecture(architecture_of(device)) | {key: e.tile for key, e in measured.items()}


@cache
def _of_architecture(arch: str) -> dict[Key, Tile]:
    return {key: entry.tile for key, entry in packaged(arch).entries.items()}
