"""Fixtures that the tuner's tests share."""

import pytest
import torch

from bra_triton.bench.tuning import timing
from bra_triton.kernels import tiles
from bra_triton.kernels.tiles.table import Tile


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRA_TRITON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tried(monkeypatch, device):
    """The tiles that the tuner tries for a forward on the tiny shape, in order: the tile in use, then two of
    a space of three; the third owns too many rows for the shape's regions."""
    space = [Tile(16, 16, 1, 2), Tile(16, 32, 2, 2), Tile(32, 16, 1, 2)]
    monkeypatch.setattr(timing, "candidates", lambda *args: space)
    monkeypatch.setattr(timing, "variants", lambda *args: [])
    return [tiles.choose(tiles.FORWARD, torch.float16, 16, 4, device), *space[:2]]
