"""What other implementations call the parameters of an attention and of a BiFormer block.

| elsewhere | here | whose |
|---|---|---|
| `lepe.weight` | `attn.lepe.weight` | pastes that are a row of a YOLO model; ours holds the attention |
| `qkv.weight` | `qkv.qkv.weight` | pastes whose projection is one layer |
| `mlp.3.weight` | `mlp.2.weight` | the authors' `Block`, which has an empty layer before the GELU |
"""

import re
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
_IN_ROW = re.compile(
    r"(.*\.)?attn\.((?:lepe|qkv\.qkv|wo|router\.emb|kv_down\.(?:key|value)|qkv_linear|output_linear)\.\w+)"
)
_IN_BLOCK = re.compile(r"(.*\.)?mlp\.2\.(\w+)")


def take_names(state: MutableMapping[str, T], names: Iterable[str]) -> None:
    """Renames in place the entries of a `state_dict` that have another implementation's names.

    Args:
        state: parameters, or anything else, by name. A name that is among `names` stays.
        names: those that the model has.

    Example:
        >>> state = {"model.11.lepe.weight": 1}
        >>> take_names(state, ["model.11.attn.lepe.weight"])
        >>> state
        {'model.11.attn.lepe.weight': 1}
    """
    own = {*names}
    for name in own - state.keys():
        for theirs in _elsewhere(name, own):
            if theirs in state and theirs not in own:
                state[name] = state.pop(theirs)
                break


def _elsewhere(name: str, own: set[str]) -> Iterator[str]:
    """What an entry may be called elsewhere."""
    places = [name]
    if found := _IN_ROW.fullmatch(name):
        places.append((found[1] or "") + found[2])
    elif (found := _IN_BLOCK.fullmatch(name)) and f"{found[1] or ''}attn.qkv.qkv.weight" in own:
        places.append(f"{found[1] or ''}mlp.3.{found[2]}")
    for place in places:
        yield place
        yield re.sub(r"\bqkv\.qkv\.", "qkv.", place)


class TakesNames(nn.Module):
    """A module whose `load_state_dict` takes the names of other implementations, also under `strict=True`."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        take_names(state_dict, [prefix + name for name in self.state_dict()])
        super()._load_from_state_dict(state_dict, prefix, *others)
