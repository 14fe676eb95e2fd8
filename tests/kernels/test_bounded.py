"""A cache never holds more entries than its bound."""

from bra_triton.kernels.bounded import MOST_ENTRIES, Bounded


def test_a_full_cache_is_emptied_for_the_next_key_and_keeps_what_comes_after():
    cache = Bounded(3)
    for key in range(8):
        cache[key] = str(key)
        assert cache[key] == str(key)
        assert len(cache) <= 3
    assert list(cache) == [6, 7]


def test_the_bound_by_default():
    cache = Bounded()
    for key in range(MOST_ENTRIES):
        cache[key] = key
    assert len(cache) == MOST_ENTRIES
    cache[-1] = 0
    assert list(cache) == [-1]
