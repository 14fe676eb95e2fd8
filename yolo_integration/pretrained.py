"""Transfers weights between models with different rows: finds which row of one belongs to which of the other.

Ultralytics transfers a tensor if its name and shape agree, and a name begins with the number of its row. So
with one more row in the backbone, all rows after it would get no weights. Here rows are matched first.
"""

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from torch import Size, Tensor, nn
from ultralytics.utils import LOGGER

from bra_triton.checkpoint_keys import take_names
from bra_triton.modules.base import Attention

MOST_NAMES = 12
FIRST_CONVOLUTION = "model.0.conv.weight"
Shapes = Mapping[str, Size]


def with_rows_of(source: Any, target: nn.Module) -> nn.Module:
    """A copy of the source in which each row has the number of the target's row that it matches.

    Args:
        source: a model of Ultralytics; it is not changed, and shares its rows with the returned model.
        target: the model that will get the weights.

    Returns:
        A model with as many rows as the target. Rows without a counterpart are empty.
    """
    rows, places = list(source.model), match_rows(_shapes(source), _shapes(target))
    moved = copy.copy(source)
    sequence = nn.Sequential(*(nn.Identity() if at is None else rows[at] for at in places))
    moved._modules = {**source._modules, "model": sequence}
    return moved


def match_rows(source: list[Shapes], target: list[Shapes]) -> list[int | None]:
    """Matches rows so that as many tensors as possible agree in name and shape.

    Args:
        source: for each row the shapes of its tensors by name.
        target: the same for the other model.

    Returns:
        For each row of `target` the index of its row in `source`, in rising order; None if it has none.

    Example:
        >>> conv, attention = {"weight": torch.Size([8, 8])}, {"qkv": torch.Size([24, 8])}
        >>> match_rows([conv, conv], [conv, attention, conv])
        [0, None, 1]
    """
    # best[i][j]: the largest number of agreeing tensors of source rows from i on and target rows from j on.
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    alike = [[sum(theirs.get(k) == v for k, v in ours.items()) for ours in target] for theirs in source]
    for i in reversed(range(len(source))):
        for j in reversed(range(len(target))):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + alike[i][j])
    places: list[int | None] = []
    i = 0
    for j in range(len(target)):
        while i < len(source) and best[i][j] == best[i + 1][j]:
            i += 1
        is_match = i < len(source) and best[i][j] > best[i][j + 1]
        places.append(i if is_match else None)
        i += is_match
    # If both have the same number of rows between two matches, these rows belong together, too, although no
    # tensor agrees: the names of another implementation differ.
    matches = [(at, j) for j, at in enumerate(places) if at is not None]
    for (i, j), (next_i, next_j) in pairwise([(-1, -1), *matches, (len(source), len(target))]):
        if next_i - i == next_j - j:
            places[j + 1 : next_j] = range(i + 1, next_i)
    return places


def report(source: nn.Module, target: nn.Module) -> None:
    """Logs which layers of the target have no counterpart in the source and so keep their own weights."""
    given, own = dict(source.state_dict()), target.state_dict()
    take_names(given, own)
    new = [name for name in own if not _is_loaded(name, given, own)]
    if not new:
        return
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in new))
    LOGGER.info(
        f"{len(new)} tensors have no counterpart in the weights and keep their initial values: "
        f"{_listed(layers)}"
    )


def _is_loaded(name: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether Ultralytics has loaded a tensor, wholly or in part.

    It loads parts of tensors of another shape in two places. Of the first convolution it loads the channels
    that both have, and of the head's last convolutions the classes that have the same name in both.
    """
    theirs, ours = given.get(name), own[name]
    if theirs is None or theirs.shape == ours.shape:
        return theirs is not None
    if name == FIRST_CONVOLUTION:
        return theirs.shape[2:] == ours.shape[2:]
    # Whether a class was loaded shows in the weight: all biases may be equal.
    weight = name.rpartition(".")[0] + ".weight"
    theirs, ours = given.get(weight, theirs), own.get(weight, ours)
    if theirs.dim() < 2 or theirs.shape[1:] != ours.shape[1:]:
        return False
    return any((theirs == channel).flatten(1).all(1).any() for channel in ours.to(theirs))


def report_settings(source: nn.Module, target: nn.Module) -> None:
    """Warns of attentions of the same shapes in source and target, but with other settings.

    Training builds a checkpoint's model anew from its yaml, so what was set on its attentions is lost.
    """
    theirs = {layer: other for layer, other in source.named_modules() if isinstance(other, Attention)}
    _warn_of_changes(
        "the model that the weights come from",
        (
            (layer, theirs[layer].settable(), ours.settable())
            for layer, ours in target.named_modules()
            if layer in theirs
            and isinstance(ours, Attention)
            and _shapes_of(ours) == _shapes_of(theirs[layer])
        ),
    )


# The settings that each attention got from its row when its model was built.
_of_rows: WeakKeyDictionary[Attention, dict[str, Any]] = WeakKeyDictionary()


def keep_settings(model: nn.Module) -> None:
    """Keeps the settings of a model that was just built from rows, for `report_lost_settings`."""
    for attention in model.modules():
        if isinstance(attention, Attention):
            _of_rows[attention] = attention.settable()


def report_lost_settings(model: nn.Module) -> None:
    """Warns of what was set on a model since it was built: training builds it anew from the same yaml."""
    _warn_of_changes(
        "this model, which training builds anew",
        (
            (layer, attention.settable(), _of_rows[attention])
            for layer, attention in model.named_modules()
            if isinstance(attention, Attention) and attention in _of_rows
        ),
    )


def _warn_of_changes(
    model: str, settings: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Warns if rows change settings.

    Args:
        model: words for the model that has the settings.
        settings: for each layer, its name, its settings in this model, and those of its row.
    """
    changes = dict[str, list[str]]()
    for layer, given, ours in settings:
        for name, value in ours.items():
            if given.get(name, value) != value:
                changes.setdefault(f"{name}={value!r}, not {given[name]!r}", []).append(layer)
    if changes:
        told = "; ".join(f"{change} ({_listed(layers)})" for change, layers in changes.items())
        LOGGER.warning(
            f"The yaml's rows decide the settings of the attention; they differ from those of {model}: "
            f"{told}. Write a setting that shall stay into the row, such as {{topk: 8}} or {{backend: torch}}"
        )


def _listed(layers: list[str]) -> str:
    rest = f" and {len(layers) - MOST_NAMES} more layers" if len(layers) > MOST_NAMES else ""
    return ", ".join(layers[:MOST_NAMES]) + rest


def _shapes(model: Any) -> list[Shapes]:
    return [_shapes_of(row) for row in model.model]


def _shapes_of(module: nn.Module) -> Shapes:
    return {name: value.shape for name, value in module.state_dict().items()}
