"""The environment variables: a misspelt one is reported, and the list of them is complete."""

import importlib
import logging
import re
from pathlib import Path

import bra_triton
from bra_triton import environment

ROOT = Path(__file__).parents[2]


def test_a_misspelt_variable_is_reported(monkeypatch, caplog):
    monkeypatch.setenv("BRA_TRITON_CHECK", "1")
    monkeypatch.setenv("BRA_TRITON_CHEK", "1")
    # `reload` would leave one folder in it; `bench/in_tree.py` needs two. It is set back after the test.
    monkeypatch.setattr(bra_triton, "__path__", bra_triton.__path__)
    with caplog.at_level(logging.WARNING, logger="bra_triton"):
        importlib.reload(bra_triton)
    (record,) = caplog.records
    assert "the environment variable BRA_TRITON_CHEK has no effect; this" in record.getMessage()


def test_every_variable_of_the_sources_is_known():
    sources = [
        path for folder in ("bra_triton", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        name for path in sources for name in re.findall(r"\bBRA_TRITON_[A-Z]+\b", path.read_text("utf-8"))
    }
    assert found == set(environment.VARIABLES)
