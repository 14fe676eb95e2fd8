"""Fixtures that the tests of launches share."""

from contextlib import nullcontext

import accesses
import pytest
from interpreter import INTERPRETED
from launch_log import Log

from bra_triton.bench import stand_in


@pytest.fixture
def log(monkeypatch, no_machine_code):
    """A log of all launches from now on, which a stand-in for the driver gets."""
    noted = Log()
    monkeypatch.setattr(
        stand_in._NoLauncher, "__call__", lambda self, *args: noted.launches.append((self, args))
    )
    with stand_in.without_gpu():
        yield noted


@pytest.fixture(autouse=True)
def _checked_accesses():
    """Checks the memory accesses of interpreted kernels: a comparison of results may not notice a fault."""
    with accesses.checked() if INTERPRETED else nullcontext():
        yield
