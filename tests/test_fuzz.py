"""A few rounds of `python -m tests.fuzz`, which itself runs for as long as its user wants."""

from collections import Counter

import fuzz
import pytest
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounds_draw_different_configurations(backend, monkeypatch):
    """A round of the triton backend has a single configuration: it must not be the same in all rounds."""
    drawn = []
    kinds = {
        kind: (draw, lambda one, _: drawn.append(str(one)) or {"": 0.0})
        for kind, (draw, _) in fuzz.KINDS.items()
    }
    monkeypatch.setattr(fuzz, "KINDS", kinds)
    monkeypatch.setattr(fuzz, "BACKENDS", (backend,))
    failed = []
    for number in range(24):
        fuzz.play_round(number, Counter(), failed)
    assert not failed
    assert len(drawn) == 24 * (fuzz.EXAMPLES if backend == "torch" else 1)
    assert len(set(drawn)) > 0.9 * len(drawn)
