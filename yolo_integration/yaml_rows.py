"""Rewrites the yaml rows of this package's blocks to the form that Ultralytics' `parse_model` understands.

The last arguments of a row are those of the attention: `topk, n_win, num_heads, ...` by position (in the
order of `attention_arguments`), by name in a mapping, or some by position followed by others by name:

    - [-1, 1, BiLevelRoutingAttention, []]
    - [-1, 1, BiLevelRoutingAttention, [8, 7]]              # topk=8, n_win=7
    - [-1, 1, nchwBRA, []]                                  # the NCHW form
    - [-1, 2, BiFormerBlock, [{topk: 16, mlp_ratio: 4}]]
    - [-1, 2, C2BRA, [1024, {topk: 8, n_win: 8}]]           # output channels first, scaled as for C2PSA
"""

import ast
import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from ultralytics.nn import tasks

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention

from .modules import C2BRA, BiFormerBlock, BiLevelRoutingAttention2d, NCHWBiLevelRoutingAttention2d

YAML_MODULES: dict[str, type[nn.Module]] = {
    "BiLevelRoutingAttention": BiLevelRoutingAttention2d,
    "NCHWBiLevelRoutingAttention": NCHWBiLevelRoutingAttention2d,
    "nchwBRA": NCHWBiLevelRoutingAttention2d,
    "BiFormerBlock": BiFormerBlock,
    "C2BRA": C2BRA,
}

_FIRST_ARGUMENTS = ("topk", "n_win", "num_heads")


def attention_arguments(name: str) -> tuple[str, ...]:
    """Names of the attention's arguments in rows of the block `name`, in the order of their positions."""
    is_nchw = YAML_MODULES[name] is NCHWBiLevelRoutingAttention2d
    attention = NCHWBiLevelRoutingAttention if is_nchw else BiLevelRoutingAttention
    rest = [key for key in inspect.signature(attention).parameters if key not in ("dim", *_FIRST_ARGUMENTS)]
    return *_FIRST_ARGUMENTS, *rest


# Classes to which parse_model passes input channels, scaled output channels and repeats, and nothing else.
_PLAIN_CSP_CLASSES = ("C3TR", "C3x", "C3Ghost", "BottleneckCSP", "C1", "C2")


class _ChannelKeepingArguments(list):
    """Arguments of a row that has as many output channels as input channels; parse_model inserts the number.

    parse_model replaces a string argument that is the name of one of its local variables by the variable's
    value. The string here is `ch`, the list of the output channels of all rows so far; `__setitem__` takes
    from that list the channels of the row that is this one's input.
    """

    def __init__(self, source: int, arguments: Sequence[Any]) -> None:
        super().__init__(["ch", *arguments])
        self.source = source

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value[self.source] if index == 0 else value)


def expand_rows(model: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites this package's rows in a model's yaml for `parse_model`; all other rows stay as they are.

    Args:
        model: the yaml's content; it is not changed.

    Returns:
        A shallow copy with the new rows.

    Raises:
        ValueError: naming the row's argument, its value and what is allowed.
    """
    parts = {part: [_expand_row(row) for row in model[part]] for part in ("backbone", "head")}
    return {**model, **parts}


def _expand_row(row: Sequence[Any]) -> Sequence[Any]:
    source, repeats, name, arguments = row
    if name not in YAML_MODULES:
        return row
    if not isinstance(source, int):
        raise ValueError(f"{name}: the row's `from` must be one row's number, got {source!r}")
    if name != "C2BRA":
        return [source, repeats, name, _ChannelKeepingArguments(source, _block_arguments(name, arguments))]
    if not arguments or not isinstance(arguments[0], int):
        raise ValueError(f"C2BRA: the first argument must be the output channels, an int, got {arguments!r}")
    return [source, repeats, name, [arguments[0], *_block_arguments(name, arguments[1:])]]


def _block_arguments(name: str, arguments: Sequence[Any]) -> list[Any]:
    """A row's last arguments by position: the mapping for the attention, then the block's own arguments."""
    parameters = list(inspect.signature(YAML_MODULES[name]).parameters.values())
    own = parameters[[parameter.name for parameter in parameters].index("attention") + 1 :]
    named = _by_name(name, arguments, [parameter.name for parameter in own])
    values = [named.pop(parameter.name, parameter.default) for parameter in own]
    return [named, *values]


def _by_name(name: str, arguments: Sequence[Any], own: Sequence[str]) -> dict[str, Any]:
    """A row's arguments by name: those of the attention, given by position or name, and the block's `own`."""
    positional = attention_arguments(name)
    allowed = (*positional, *own)
    named: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        if not isinstance(argument, Mapping):
            if any(isinstance(earlier, Mapping) for earlier in arguments[:position]):
                raise ValueError(f"{name}: positional argument {argument!r} follows named ones: {arguments}")
            if position >= len(positional):
                raise ValueError(
                    f"{name}: {len(arguments)} positional arguments; at most {len(positional)} are allowed: "
                    f"{', '.join(positional)}"
                )
            argument = {positional[position]: argument}
        for key, value in argument.items():
            if key not in allowed:
                raise ValueError(f"{name}: unknown argument {key!r}; allowed are {', '.join(allowed)}")
            if key in named:
                raise ValueError(f"{name}: argument {key!r} is given twice: {arguments}")
            named[key] = _literal(value)
    return named


def _literal(value: Any) -> Any:
    """Evaluates a string as Ultralytics does: its model files write `None`, which yaml reads as a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(value)
    return value


@contextlib.contextmanager
def c2bra_parsed_as_csp(model: Mapping[str, Any]) -> Iterator[None]:
    """Context in which `parse_model` treats `C2BRA` like `C2PSA`: input channels, scaled width, repeats.

    parse_model decides what to pass to a class by sets of classes, which it builds in every call from global
    names of its module. So in this context one of these names, of a class that the yaml does not use, refers
    to `C2BRA`.

    Args:
        model: the yaml's content.
    """
    used = {row[2] for part in ("backbone", "head") for row in model[part]}
    if "C2BRA" not in used:
        yield
        return
    name = next(name for name in _PLAIN_CSP_CLASSES if name not in used)
    stock = getattr(tasks, name)
    setattr(tasks, name, C2BRA)
    try:
        yield
    finally:
        setattr(tasks, name, stock)
