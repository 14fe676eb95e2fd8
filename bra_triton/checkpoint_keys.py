"""Names of an attention's and a BiFormer block's parameters in other implementations, and in this package.

| elsewhere | here | which implementation |
|---|---|---|
| `lepe.weight` | `attn.lepe.weight` | copies that are a YOLO row; our row holds the attention as `attn` |
| `qkv.weight` | `qkv.qkv.weight` | copies whose projection is one layer |
| `mlp.3.weight` | `mlp.2.weight` | the authors' `Block`, which has an empty layer before the GELU |

A copy is a version of the authors' module in another project.
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
        state: parameters, or any other values, by name. Entries whose name is in `names` stay.
        names: the model's names.

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
    """The names that the entry `name` may have elsewhere; `own` are the model's names."""
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
