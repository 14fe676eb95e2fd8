"""The yaml rows of this package's blocks: checks them and rewrites them for Ultralytics' `parse_model`.

Rows of the two attentions take the arguments that follow `dim` in the signature of their class: by position,
by name in a mapping, or some by position followed by others by name. Rows of blocks take arguments by name
only. A row never gives its input channels:

    - [-1, 1, BiLevelRoutingAttention, []]
    - [-1, 1, BiLevelRoutingAttention, [8, 7]]              # num_heads=8, n_win=7
    - [-1, 1, nchwBRA, [{topk: 8}]]                         # the NCHW form
    - [-1, 2, BiFormerBlock, [{topk: 16, mlp_ratio: 4}]]
    - [-1, 2, C2BRA, [1024, {topk: 8, e: 0.25}]]            # output channels first, scaled as for C2PSA
    - [-1, 2, C3k2BRA, [512]]                               # likewise, as for C3k2

`docs/migration.md` has the rows of other implementations and what to write instead of them.
"""

import ast
import contextlib
import inspect
import itertools
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.arguments import is_whole, whole
from bra_triton.modules.nhwc import without_effect

from .modules import (
    C2BRA,
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    C3k2BRA,
    NCHWBiLevelRoutingAttention2d,
)

YAML_MODULES: dict[str, type[nn.Module]] = {
    "BiLevelRoutingAttention": BiLevelRoutingAttention2d,
    "NCHWBiLevelRoutingAttention": NCHWBiLevelRoutingAttention2d,
    "nchwBRA": NCHWBiLevelRoutingAttention2d,
    "BiFormerBlock": BiFormerBlock,
    "C2BRA": C2BRA,
    "C3k2BRA": C3k2BRA,
}

# A row may name a block with this prefix. If the package was not imported, parse_model raises a KeyError that
# contains only the name in the row; with the prefix this name says what to import.
IMPORT_PATH = "bra_triton.yolo_integration."

_ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    BiLevelRoutingAttention2d: BiLevelRoutingAttention,
    NCHWBiLevelRoutingAttention2d: NCHWBiLevelRoutingAttention,
}

# A larger number in the place of an argument is taken for a channel count. BiFormer's models have at most 24
# heads, and the Triton kernels take at most 64 x 64 regions.
_MOST_BY_POSITION = {"num_heads": 32, "n_win": 64}
_CHANNEL_NAMES = ("dim", "c1", "c2", "ch")

# Classes to which parse_model passes input channels, scaled output channels and repeats, and nothing else.
_PLAIN_CSP_CLASSES = ("C3TR", "C3x", "C3Ghost", "BottleneckCSP", "C1", "C2")
# For each of our blocks that parse_model has to treat like these classes, the classes in whose place it can
# be parsed. C2fCIB is first for C3k2BRA because, like C3k2, it makes parse_model choose the newer form of the
# Detect head.
_PARSED_AS = {"C2BRA": _PLAIN_CSP_CLASSES, "C3k2BRA": ("C2fCIB", *_PLAIN_CSP_CLASSES)}

# Names of similar blocks in other projects: C2f_BiFormer, BRA, BiLevelRoutingAttention_nchw.
_RELATIVE = re.compile(r"BRA|(?i:(?<![a-z])bra(?![a-z])|nchw_?bra|bi_?former|bi_?level|routing_?attention)")
_NEAREST = (
    ("C2f|C3|CSP", "C3k2BRA"),
    ("C2|PSA", "C2BRA"),
    ("nchw", "nchwBRA"),
    ("former|block|stage", "BiFormerBlock"),
    ("", "BiLevelRoutingAttention"),
)


class _ChannelKeepingArguments(list):
    """Arguments of a row that has as many output channels as input channels; parse_model inserts the number.

    parse_model replaces a string argument that is the name of one of its local variables by the variable's
    value. The string here is `ch`, the list of the output channels of all rows so far; `__setitem__` takes
    from that list the channels of the row that is this one's input.
    """

    def __init__(self, source: int, arguments: Sequence[Any], heads: Any = None) -> None:
        super().__init__(["ch", *arguments])
        self.source = source
        self.heads = heads  # num_heads, if the row gives it by position

    def __setitem__(self, index: Any, value: Any) -> None:
        if index == 0:
            value = value[self.source]
            if value == self.heads:
                # parse_model ignores a ValueError here; `errors_name_the_row` turns this one into one.
                raise TypeError(_no_channel_count(value, "leave it out"))
        super().__setitem__(index, value)


def expand_rows(model: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites this package's rows in a model's yaml for `parse_model`; all other rows stay as they are.

    Args:
        model: the yaml's content; it is not changed.

    Returns:
        A shallow copy with the new rows.

    Raises:
        ValueError: naming the row, the argument, its value and what is allowed; also for a module that
            Ultralytics does not know and whose name resembles a block's.

    Example:
        >>> expand_rows({"backbone": [[-1, 2, "C2BRA", [1024, {"topk": 8}]]], "head": []})["backbone"]
        [[-1, 2, 'C2BRA', [1024, {'topk': 8}, 0.5]]]
    """
    rows = [_expand_row(index, row) for index, row in enumerate(_rows(model))]
    head = len(model["backbone"])
    return {**model, "backbone": rows[:head], "head": rows[head:]}


def _rows(model: Mapping[str, Any]) -> list[Sequence[Any]]:
    return [*model["backbone"], *model["head"]]


def _expand_row(index: int, row: Sequence[Any]) -> Sequence[Any]:
    name = _block_name(row)
    try:
        if name not in YAML_MODULES and not _has_block(row):
            _refuse_relative(row)
            return row
        if name not in YAML_MODULES or len(row) != 4:
            raise ValueError(f"a row is [from, repeats, module, args], in this order, got {len(row)} entries")
        source, repeats, _, arguments = row
        _check_source(index, source)
        whole("repeats", repeats)
        expanded = _expand_arguments(name, source, _as_list(arguments))
    except ValueError as error:
        raise ValueError(_about_row(error, index, row)) from None
    for reason in without_effect(expanded[1]):
        LOGGER.warning(_about_row(reason, index, row))
    return [source, repeats, name, expanded]


def _block_name(row: Sequence[Any]) -> str:
    """The name in a row, without `IMPORT_PATH`; empty if `row` is not a row."""
    is_row = isinstance(row, Sequence) and len(row) > 2 and isinstance(row[2], str)
    return row[2].removeprefix(IMPORT_PATH) if is_row else ""


def _has_block(row: Any) -> bool:
    """Whether any entry of a row, wherever it stands, is the name of a block."""
    entries = row if isinstance(row, list | tuple) else ()
    return any(isinstance(x, str) and x.removeprefix(IMPORT_PATH) in YAML_MODULES for x in entries)


def _refuse_relative(row: Sequence[Any]) -> None:
    name = row[2] if _block_name(row) else ""
    if name in vars(tasks) or not _RELATIVE.search(name):
        return
    nearest = next(block for pattern, block in _NEAREST if re.search(pattern, name, re.IGNORECASE))
    raise ValueError(
        f"there is no module {name!r}; the nearest one in bra_triton is {nearest!r}, and docs/migration.md "
        f"says what to write; allowed are {', '.join(YAML_MODULES)} and the modules of Ultralytics"
    )


def _check_source(index: int, source: Any) -> None:
    lowest, highest = (-index, index - 1) if index else (-1, -1)
    if not isinstance(source, int) or isinstance(source, bool) or not lowest <= source <= highest:
        raise ValueError(
            f"`from` must be the number of one earlier row, {lowest} to {highest}, got {source!r}"
        )


def _as_list(arguments: Any) -> list[Any]:
    arguments = _literal(arguments)
    if arguments is None or isinstance(arguments, Mapping):
        return [arguments] if arguments else []
    if isinstance(arguments, str) or not isinstance(arguments, Sequence):
        raise ValueError(f"args must be a list or a mapping, such as [{{topk: 4}}], got {arguments!r}")
    return [_literal(argument) for argument in arguments]


def _expand_arguments(name: str, source: int, arguments: list[Any]) -> list[Any]:
    """A row's arguments by position: channels, the mapping for the attention, the block's own arguments."""
    parameters = list(inspect.signature(YAML_MODULES[name]).parameters.values())
    own = parameters[[parameter.name for parameter in parameters].index("attention") + 1 :]
    channels = arguments[:1] if name in _PARSED_AS else []
    if name in _PARSED_AS and not (channels and is_whole(channels[0])):
        raise ValueError(
            f"the first argument must be the output channels, an int of at least 1, such as [1024], "
            f"got {arguments!r}"
        )
    named = _by_name(name, channels, arguments[len(channels) :], [parameter.name for parameter in own])
    values = [named.pop(parameter.name, parameter.default) for parameter in own]
    for parameter, value in zip(own, values, strict=True):
        if isinstance(value, str):  # parse_model would replace it, if it has a local variable of that name
            raise ValueError(f"{parameter.name} must be a number, got {value!r}")
    if channels:
        return [*channels, named, *values]
    is_first = bool(arguments) and not isinstance(arguments[0], Mapping)
    return _ChannelKeepingArguments(source, [named, *values], named["num_heads"] if is_first else None)


def _by_name(name: str, channels: list[Any], arguments: list[Any], own: list[str]) -> dict[str, Any]:
    """The arguments after a row's output channels, by name: the attention's and the block's `own`."""
    attention = _ATTENTIONS.get(YAML_MODULES[name], BiLevelRoutingAttention)
    parameters = [value for key, value in inspect.signature(attention).parameters.items() if key != "dim"]
    allowed = [*(parameter.name for parameter in parameters), *own]
    positional = [parameter.name for parameter in parameters if parameter.kind != parameter.KEYWORD_ONLY]
    given = list(itertools.takewhile(lambda argument: not isinstance(argument, Mapping), arguments))
    mappings = arguments[len(given) :]
    if YAML_MODULES[name] in _ATTENTIONS:
        _refuse_channel_counts(given, mappings)
    elif given:
        _refuse_positions(channels, given, mappings, allowed)
    if len(given) > len(positional):
        raise ValueError(
            f"at most {len(positional)} arguments go by position, {', '.join(positional)}; got {len(given)}"
        )
    named = dict(zip(positional, given, strict=False))
    for mapping in mappings:
        if not isinstance(mapping, Mapping):
            raise ValueError(f"positional argument {mapping!r} follows named ones: {arguments}")
        for key, value in mapping.items():
            _check_name(key, allowed, named)
            named[key] = _literal(value)
    return named


def _check_name(key: Any, allowed: list[str], named: Mapping[str, Any]) -> None:
    if key in _CHANNEL_NAMES:
        raise ValueError(f"rows need no channel count, got the name {key!r}; leave it out")
    if key not in allowed:
        raise ValueError(f"unknown argument {key!r}; allowed are {', '.join(allowed)}")
    if key in named:
        raise ValueError(f"argument {key!r} is given twice, the first time as {named[key]!r}")


def _refuse_channel_counts(given: list[Any], mappings: list[Any]) -> None:
    rest = list(itertools.dropwhile(_is_channel_count, given))
    counts = given[: len(given) - len(rest)]
    if len(rest) > 1 and _is_channel_count(rest[1], "n_win"):
        counts.append(rest.pop(1))
    if counts:
        raise ValueError(_no_channel_count(counts[0], f"write {rest + mappings}"))


def _no_channel_count(count: Any, instead: str) -> str:
    limits = " and ".join(f"{name} above {most}" for name, most in _MOST_BY_POSITION.items())
    return (
        f"rows need no channel count, got {count!r}; {instead}, see docs/migration.md. The first two numbers "
        f"are num_heads and n_win; as many heads as channels, {limits} must be given by name"
    )


def _is_channel_count(value: Any, place: str = "num_heads") -> bool:
    if isinstance(value, str):
        return value in _CHANNEL_NAMES
    return isinstance(value, int | float) and value > _MOST_BY_POSITION[place]


def _refuse_positions(channels: list[Any], given: list[Any], mappings: list[Any], allowed: list[str]) -> None:
    # C2PSA and C3k2 take `e` by position; it is the only number with a fraction that they take.
    ratios = [{"e": value} for value in given if channels and isinstance(value, float)]
    hint = "" if channels or not _is_channel_count(given[0]) else "rows need no channel count, and "
    raise ValueError(
        f"{hint}arguments of this block go by name, got {given}; write {channels + ratios[:1] + mappings}, "
        f"and give all other arguments in a mapping, such as {{topk: 4}}; allowed are {', '.join(allowed)}"
    )


def _literal(value: Any) -> Any:
    """Evaluates a string as Ultralytics does: its model files write `None`, which yaml reads as a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(value)
    return value


def _about_row(message: object, index: int, row: Sequence[Any]) -> str:
    return f"row {index}, {list(row)}: {message}"


@contextlib.contextmanager
def errors_name_the_row(yaml_of: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Context in which Ultralytics builds a model, and in which errors of this package's rows name the row.

    Args:
        yaml_of: returns the yaml's content as the user wrote it; called only after an error.

    Raises:
        ValueError: instead of a TypeError, ValueError or RuntimeError that came from one of this package's
            rows, while the row was built or while Ultralytics tried the model on a small image.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        # Not torch.OutOfMemoryError and other derived classes, which callers look for by their class.
        is_plain = not isinstance(error, RuntimeError) or type(error) is RuntimeError
        index, trial = _row_of(error) if is_plain else (None, "")
        if index is None or _block_name(row := _rows(yaml_of())[index]) not in YAML_MODULES:
            raise
        raise ValueError(_about_row(f"{error}{trial}", index, row)) from error


def _row_of(error: Exception) -> tuple[int | None, str]:
    """The number of the row from which an error came, or None; and what else the error's text should say."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function, local = frame.f_code.co_name, frame.f_locals
        if function == "parse_model" and "i" in local:
            return local["i"], ""
        if function == "_predict_once" and "m" in local:
            return local["m"].i, " (Ultralytics tries new models on the CPU, at 256 x 256 pixels)"
    return None, ""


@contextlib.contextmanager
def blocks_parsed_as_csp(model: Mapping[str, Any]) -> Iterator[None]:
    """Context in which `parse_model` treats `C2BRA` like `C2PSA` and `C3k2BRA` like `C3k2`.

    parse_model passes them input channels, scaled width and repeats. It decides what to pass to a class by
    sets of classes, which it builds in every call from global names of its module. So in this context some of
    these names, of classes that the yaml does not use, refer to this package's blocks.

    Args:
        model: the yaml's content, with expanded rows.
    """
    used = {_block_name(row) for row in _rows(model)}
    stand_ins: dict[str, type[nn.Module]] = {}
    for block, candidates in _PARSED_AS.items():
        if block in used:
            name = next(name for name in candidates if name not in used and name not in stand_ins)
            stand_ins[name] = YAML_MODULES[block]
    stock = {name: getattr(tasks, name) for name in stand_ins}
    vars(tasks).update(stand_ins)
    try:
        yield
    finally:
        vars(tasks).update(stock)
