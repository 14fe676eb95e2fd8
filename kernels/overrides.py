"""What a thread has set in place of the architecture, the tiles and the form that would be chosen.

`tiles.use_architecture`, `tiles.use_tiles` and `forms.use_form` set it. Does not import Triton.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class Overrides(NamedTuple):
    """What is set in a thread; a part of every plan's key.

    Attributes:
        architecture: the architecture whose shipped tiles launches get; None if it is not set.
        tiles: kernels and the `tiles.Tile` that each of them gets; the others are not set.
        form: the form that attentions get; None if it is not set.
    """

    architecture: str | None = None
    tiles: tuple[tuple[str, Any], ...] = ()
    form: str | None = None


_NONE = Overrides()
_overrides: ContextVar[Overrides] = ContextVar("overrides", default=_NONE)


def in_force() -> Overrides:
    """What is set in this thread."""
    return _overrides.get()


@contextmanager
def use(**changes: Any) -> Iterator[None]:
    """Context that sets attributes of `Overrides` in this thread; the other attributes stay."""
    token = _overrides.set(in_force()._replace(**changes))
    try:
        yield
    finally:
        _overrides.reset(token)
