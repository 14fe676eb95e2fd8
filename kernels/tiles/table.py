"""Tables of tile configurations: their entries, and the files that hold them. Does not import Triton.

A table is a JSON file with one line per entry, so that two versions can be compared line by line. The package
ships one per architecture, `tuned/<arch>.json`; `bra-autotune` writes them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from importlib import resources
from typing import Any

FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT = "forward", "query_gradient", "key_value_gradient"
KERNELS = (FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT)
BITS = (16, 32)
HEAD_DIMS = (16, 32, 64, 128, 256)
SIZES = (16, 32, 64, 128)
PLAIN, PADDED, WEIGHTED = FORMS = ("plain", "padded", "weighted")
FALLBACK = "sm_80"
_HEAD = ("arch", "origin", "torch", "triton")
_SHAPE = ("own", "step", "num_warps", "num_stages")
# The smallest and the largest value of each field. The largest ones are above all values in the tables; 32 is
# the most warps that a program can have.
_LIMITS = {
    "own": (16, 256),
    "step": (16, 256),
    "num_warps": (1, 32),
    "num_stages": (1, 8),
    "exp_share": (0, 32),
}
_ROW_TYPES: dict[str, tuple[type, ...]] = {
    **{"kernel": (str,), "bits": (int,), "head_dim": (int,), "size": (int,), "form": (str,)},
    **dict.fromkeys(_SHAPE, (int,)),
    **{"cost": (float, int, type(None)), "options": (dict,), "measured_on": (str,)},
}


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with how many threads.

    Attributes:
        own: rows that the program owns, a power of two from 16 to 256.
        step: tokens of the other side that it reads in one step of its loop, a power of two from 16 to 256.
        num_warps: warps of 32 threads (gfx942: 64), a power of two up to 32, the most that a program may
            have.
        num_stages: depth of the software pipeline, at most 8.
        exp_share: one in `exp_share` exponentials is evaluated by multiply-adds; a power of two, or 0 for
            none. Only for the forward and dQ in half precision.
        fuses_lepe: whether the forward adds LePE to its tile before it stores it; if not, LePE has a separate
            launch. Only for the forward.

    Raises:
        ValueError: if a value is not allowed; names it.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    exp_share: int = 0
    fuses_lepe: bool = True

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            is_allowed = type(value) is int and least <= value <= most
            if not is_allowed or (name != "num_stages" and value & (value - 1)):
                kind = "an int" if name == "num_stages" else "a power of two"
                raise ValueError(f"{name} must be {kind} from {least} to {most}, got {value!r}")
        if self.exp_share == 1 or 8 * self.exp_share > self.step:
            raise ValueError(
                f"exp_share must be 0, or 2 to step / 8 = {self.step // 8}, got {self.exp_share}"
            )
        if type(self.fuses_lepe) is not bool:
            raise ValueError(f"fuses_lepe must be a bool, got {self.fuses_lepe!r}")

    def __str__(self) -> str:
        exponentials = f" 1/{self.exp_share} exp" if self.exp_share else ""
        lepe = "" if self.fuses_lepe else " lepe apart"
        return f"{self.own}x{self.step} {self.num_warps}w {self.num_stages}s{exponentials}{lepe}"


_OPTIONS = {field.name: field.default for field in fields(Tile) if field.name not in _SHAPE}


@dataclass(frozen=True)
class Key:
    """The problems that an entry of a table serves.

    Attributes:
        kernel: one of `KERNELS`.
        bits: bits of an element, 16 or 32; float16 and bfloat16 share their tiles.
        head_dim: channels of the widest head that it serves, one of `HEAD_DIMS`.
        size: tokens of the largest region that it serves, one of `SIZES`; the last also serves all larger
            regions.
        form: what a kernel holds in registers in addition, one of `FORMS`. "plain": nothing. "padded": the
            map is padded, or a head is padded to a power of two of at least 16 channels, or each head has a
            graph of its own. "weighted": there are routing weights, or their gradient is needed. The widest
            tiles fill the registers in the plain form and would spill in the others.

    Raises:
        ValueError: if a value is not allowed; names it.
    """

    kernel: str
    bits: int
    head_dim: int
    size: int
    form: str = PLAIN

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kernel", KERNELS),
            ("bits", BITS),
            ("head_dim", HEAD_DIMS),
            ("size", SIZES),
            ("form", FORMS),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")

    @classmethod
    @lru_cache(1024)  # called three times in each training step
    def of(cls, kernel: str, bits: int, head_dim: int, region_tokens: int, form: str = PLAIN) -> "Key":
        """The entry that serves a problem; see `tiles.choose`."""
        width = next((width for width in HEAD_DIMS if width >= head_dim), head_dim)
        size = next((size for size in SIZES if size >= region_tokens), SIZES[-1])
        return cls(kernel, bits, width, size, form)

    def __str__(self) -> str:
        form = "" if self.form == PLAIN else f" {self.form}"
        return f"{self.kernel} fp{self.bits} head {self.head_dim} size {self.size}{form}"


@dataclass(frozen=True)
class Entry:
    """One configuration with its predicted or measured cost.

    Attributes:
        tile: the configuration.
        cost: the cost model's prediction, or milliseconds if it was measured; None if unknown.
        measured_on: card and versions with which an entry of a shipped table was measured; else empty.
    """

    tile: Tile
    cost: float | None = None
    measured_on: str = ""


@dataclass(frozen=True)
class Table:
    """All configurations of one architecture.

    Attributes:
        arch: "sm_90", "gfx942", ...
        origin: where the entries without `measured_on` come from: "predicted" (from machine code, without a
            GPU) or "default" (neither measured nor predicted).
        torch: version of PyTorch that it was made with.
        triton: version of Triton that it was made with; if predictions were confirmed with further versions,
            all of these versions.
        entries: the entries, by the problems that they serve.
    """

    arch: str
    origin: str
    torch: str
    triton: str
    entries: Mapping[Key, Entry]


def parse_entry(row: Mapping[str, Any]) -> tuple[Key, Entry]:
    """Reads one line of a table.

    Raises:
        ValueError: if the line is not a JSON object, lacks a field, or has a field or an option of a wrong
            type or value; says which.
    """
    require({"measured_on": "", **row} if isinstance(row, Mapping) else row, "a tile's entry", _ROW_TYPES)
    if unknown := row["options"].keys() - _OPTIONS.keys():
        raise ValueError(
            f"a tile's entry has the unknown option {min(unknown)!r}, not one of {', '.join(_OPTIONS)}: {row}"
        )
    try:
        key = Key(*(row[field.name] for field in fields(Key)))
        tile = Tile(*(row[name] for name in _SHAPE), **row["options"])
    except ValueError as error:
        raise ValueError(f"a tile's entry is impossible: {error}: {row}") from error
    if tile.exp_share and key.bits == 32:
        raise ValueError(f"exp_share must be 0 with 32 bits, because it is too inexact for float32: {row}")
    try:
        cost = None if row["cost"] is None else float(row["cost"])
    except OverflowError as error:
        raise ValueError(f"a tile's entry has an impossible cost: {error}: {row}") from error
    return key, Entry(tile, cost, row.get("measured_on", ""))


def entry_row(key: Key, entry: Entry) -> dict[str, Any]:
    """One line of a table; "options" has the values that differ from a tile's defaults."""
    tile = asdict(entry.tile)
    shape = {name: tile.pop(name) for name in _SHAPE}
    options = {name: value for name, value in tile.items() if value != _OPTIONS[name]}
    row = {**asdict(key), **shape, "cost": entry.cost, "options": options}
    return row | {"measured_on": entry.measured_on} if entry.measured_on else row


def parse_table(text: str) -> Table:
    """Reads a table's file.

    Raises:
        ValueError: if the file is not a JSON object, lacks a field, or has one of a wrong type; says which.
    """
    content = json.loads(text)
    require(content, "a table of tiles", {**dict.fromkeys(_HEAD, (str,)), "entries": (list,)})
    entries = dict(parse_entry(row) for row in content["entries"])
    return Table(**{name: content[name] for name in _HEAD}, entries=entries)


def require(content: Any, what: str, types: Mapping[str, tuple[type, ...]]) -> None:
    """Checks that the content of a JSON file is an object with these fields, of these types.

    Raises:
        ValueError: if it is not; names `what`, the field, and its value.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be a JSON object, got {content!r}")
    for name, allowed in types.items():
        if name not in content:
            raise ValueError(f"{what} lacks the field {name!r}: {content}")
        if type(content[name]) not in allowed:  # not `isinstance`, for which True is an int
            choices = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{what} must have a {name!r} of type {choices}, got {content[name]!r}")


def format_table(table: Table) -> str:
    """The text of a table's file."""
    head = {name: getattr(table, name) for name in _HEAD}
    return format_rows(head, [entry_row(*item) for item in table.entries.items()])


def format_rows(head: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """JSON of `head` and, under "entries", the rows, each on its own line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    opening = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    return f'{{\n{opening} "entries": [\n{lines}\n ]\n}}\n'


@cache
def packaged(arch: str) -> Table:
    """The table that the package ships for `arch`, or for the architecture that `nearest` finds."""
    return parse_table(_folder().joinpath(f"{nearest(arch, packaged_archs())}.json").read_text())


@cache
def packaged_archs() -> tuple[str, ...]:
    """Architectures for which the package has a table."""
    names = (file.name for file in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def nearest(arch: str, available: tuple[str, ...]) -> str:
    """The available architecture whose table `arch` gets.

    That is `arch` itself if it is available. Otherwise, an NVIDIA architecture gets the newest available one
    before it, and an AMD architecture gets the first available one of AMD; if there is none, `FALLBACK`.

    Raises:
        ValueError: if `arch` is not the name of an architecture.
    """
    if not re.fullmatch(r"sm_\d+|gfx\w+", arch):
        raise ValueError(f"arch must be like sm_90 or gfx942, got {arch!r}")
    if arch in available:
        return arch
    if arch.startswith("gfx"):
        return next((name for name in available if name.startswith("gfx")), FALLBACK)
    older = [name for name in available if name.startswith("sm_") and _number(name) < _number(arch)]
    return max(older, key=_number, default=FALLBACK)


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _folder() -> Any:
    return resources.files(__package__).joinpath("tuned")
