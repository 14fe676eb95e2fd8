"""A cache with a limited number of entries."""

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

# A training run makes a few entries for each size of map and each module's settings. Only a data set with
# images of very many sizes makes more entries than this.
MOST_ENTRIES = 1024


class Bounded(dict[K, V]):
    """A dictionary that is emptied when a key is assigned while it holds `most` entries.

    It has no lock. If two threads use it at the same time, an entry may be made twice, or dropped and made
    again; both are harmless.
    """

    def __init__(self, most: int = MOST_ENTRIES) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.most:
            self.clear()
        super().__setitem__(key, value)
