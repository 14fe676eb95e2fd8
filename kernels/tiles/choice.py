"""Which tile configuration a launch gets.

A program "owns" a tile of rows (queries in the forward and dQ, keys in dK/dV) and reads the tokens of the
other side in steps. Rows past the end of a region are wasted, so smaller regions get smaller tiles.

If `bra-autotune` measured an entry on this card (it is in the user's cache), its tile is chosen. Otherwise
the tile comes from the table that the package ships for the card's architecture, or for the nearest older
one. Tables are read at the first launch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch

from .. import overrides
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

# The architecture whose tiles serve tensors that are not on a GPU: in the interpreter, or without data.
DEFAULT_ARCHITECTURE = "sm_90"

# Tiles of masked attention, which serves only half precision and heads of at most 32 channels. Of eleven
# tiles they were the fastest on an H200 at BiFormer's third stage (`bra-bench kernel-times`), with one
# exception: for dK/dV 128 x 64 was a little faster, but it spills registers under Triton 3.8.
MASKED_TILES = {
    FORWARD: Tile(64, 64, 4, 2),
    QUERY_GRADIENT: Tile(64, 64, 4, 2),
    KEY_VALUE_GRADIENT: Tile(128, 32, 4, 2),
}


def channel_block(head_dim: int) -> int:
    """Channels that a tile holds for a head of `head_dim`: rounded up to a power of two of at least 16."""
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
        head_dim: channels of a head's queries or of its values, whichever are more; at most 256.
        region_tokens: tokens in a region, `S`.
        device: where the tensors are; see `use_architecture` for tensors that are not on a GPU.
        form: see `Key`.
    """
    overridden = overrides.in_force()
    tile: Tile | None = dict(overridden.tiles).get(kernel)
    if tile:
        return tile
    key = Key.of(kernel, 8 * dtype.itemsize, head_dim, region_tokens, form)
    arch = overridden.architecture
    if arch is None and device.type == "cuda":
        return _of_card(torch.cuda.current_device() if device.index is None else device.index)[key]
    return _of_architecture(arch or DEFAULT_ARCHITECTURE)[key]


def tile_form(heads: tuple[int, int], is_padded: bool, n_graphs: int, is_weighted: bool) -> str:
    """The form of a tile: "plain", "padded" or "weighted", see `Key`.

    Args:
        heads: channels of a query and of a value in one head.
        is_padded: whether keys and values have padding.
        n_graphs: graphs per image.
        is_weighted: whether keys and values have a factor, or the factor's gradient is needed.
    """
    if is_weighted:
        return WEIGHTED
    narrow = any(channel_block(head_dim) != head_dim for head_dim in heads)
    return PADDED if is_padded or narrow or n_graphs > 1 else PLAIN


@contextmanager
def use_architecture(arch: str) -> Iterator[None]:
    """Context in which launches of this thread get the tiles that the package ships for `arch`.

    For launches that are recorded, compiled or interpreted without the GPU that they are meant for.

    Raises:
        ValueError: if `arch` is not the name of an architecture.
    """
    nearest(arch, packaged_archs())
    with overrides.use(architecture=arch):
        yield


@contextmanager
def use_tiles(by_kernel: Mapping[str, Tile]) -> Iterator[None]:
    """Context in which launches of this thread get the tiles `by_kernel`; other kernels keep their tiles."""
    with overrides.use(tiles=tuple(by_kernel.items())):
        yield


def architecture_of(device: torch.device) -> str:
    """Architecture of a GPU, such as "sm_90" or "gfx942"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# Functions that `forget` calls; each of them drops what was made from the tables.
when_forgotten: list[Callable[[], None]] = []


def forget() -> None:
    """Makes the next launch read all tables again; to be called after one has been written."""
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
