"""What the tests of launches share."""

import pytest
from launch_log import Log

from bra_triton.bench import stand_in


@pytest.fixture
def log(monkeypatch):
    """What is launched from now on, on a stand-in for the driver."""
    noted = Log()
    monkeypatch.setattr(
        stand_in._NoLauncher, "__call__", lambda self, *args: noted.launches.append((self, args))
    )
    with stand_in.without_gpu():
        yield noted
