"""A few rounds of `python -m tests.fuzz`, which itself runs for as long as its user wants."""

from collections import Counter

import fuzz
from properties import needs_interpreter

# Seeds of rounds on the torch backend: one for each kind and way, except for the compiled NCHW module, which
# takes 8 s. `test_properties` and `test_nchw_properties` draw the same configurations for the kernels.
ROUNDS = (1, 2, 5, 7, 9, 13, 14, 19, 23, 32, 49)


@needs_interpreter
def test_rounds_of_every_kind_and_way():
    tried, failed = Counter(), []
    for number in ROUNDS:
        fuzz.play_round(number, tried, failed)
    assert not failed
    assert {kind for kind, *_ in tried} == set(fuzz.KINDS)
    assert {(kind, way) for kind, _, way, _ in tried} >= {("module", way) for way in fuzz.WAYS}
