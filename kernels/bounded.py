"""A cache of what was made before, which cannot grow without end."""

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

# A training run makes a few entries for every size of map and every module's numbers; a data set of images
# of all sizes may bring more than this.
MOST_ENTRIES = 1024


class Bounded(dict[K, V]):
    """A dictionary that is emptied when a key is assigned while it holds `most` entries.

    It needs no lock: threads that meet make an entry twice, or drop one that is then made again.
    """

    def __init__(self, most: int = MOST_ENTRIES) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.most:
            self.clear()
        super().__setitem__(key, value)
