"""The user's cache of measured tiles: what counts, what is ignored, and who may write at once."""

import json
import logging
import multiprocessing
import os
import time

import pytest
import torch

from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import cache as tile_cache
from bra_triton.kernels.tiles.table import HEAD_DIMS, SIZES, Entry, Key, Tile, packaged

CARD = "NVIDIA H100 80GB HBM3"
KEY = Key(tiles.FORWARD, 16, 32, 128)
ENTRY = Entry(Tile(128, 32, 8, 5), 0.25)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRA_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(tile_cache, "_warned", set())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert tile_cache.path() == tmp_path / "tuned.json"
    monkeypatch.delenv("BRA_TRITON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tile_cache.path() == tmp_path / "xdg" / "bra_triton" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tile_cache.path() == tmp_path / "home" / ".cache" / "bra_triton" / "tuned.json"


def test_no_cache_is_no_news(caplog):
    assert tile_cache.read(CARD) == {}
    assert not warnings(caplog)


def test_what_is_written_is_read():
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}
    assert [file.suffix for file in sorted(tile_cache.folder().iterdir())] == [".json", ".lock"]


def test_an_update_replaces_its_own_keys_alone():
    other = Key(tiles.QUERY_GRADIENT, 32, 64, 16)
    tile_cache.update(CARD, {KEY: Entry(Tile(16, 16, 1, 1)), other: ENTRY})
    tile_cache.update("another card", {KEY: Entry(Tile(32, 32, 2, 2))})
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY, other: ENTRY}
    assert tile_cache.read("another card")[KEY].tile == Tile(32, 32, 2, 2)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 2, "entries": []}',
        '{"format": 1, "entries": 5}',
        '{"format": 1, "entries": [5]}',
        '{"format": 1, "entries": [{}]}',
        '{"format": 1, "entries": [null]}',
    ],
)
def test_a_broken_cache_is_ignored_with_one_warning(content, caplog):
    tile_cache.path().write_text(content)
    assert tile_cache.read(CARD) == {}
    assert tile_cache.read(CARD) == {}
    assert len(warnings(caplog)) == 1
    assert str(tile_cache.path()) in warnings(caplog)[0]
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_half_a_cache_is_ignored(share, caplog):
    tile_cache.update(CARD, {KEY: ENTRY})
    whole = tile_cache.path().read_text()
    tile_cache.path().write_text(whole[: int(share * len(whole))])
    assert tile_cache.read(CARD) == {}
    assert len(warnings(caplog)) == 1


def test_bytes_that_are_no_text_are_ignored(caplog):
    tile_cache.path().write_bytes(b"\xff\xfe\x00garbage")
    assert tile_cache.read(CARD) == {}
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("wrong", [{"own": 48}, {"num_warps": "4"}, {"kernel": "sideways"}, {"head_dim": 48}])
def test_an_impossible_tile_is_ignored(wrong, caplog):
    tile_cache.update(CARD, {KEY: ENTRY})
    content = json.loads(tile_cache.path().read_text())
    content["entries"][0] |= wrong
    tile_cache.path().write_text(json.dumps(content))
    assert tile_cache.read(CARD) == {}
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    "foreign", [{"card": "NVIDIA A100"}, {"torch": "1.0"}, {"triton": "1.0"}, {"source": "other"}]
)
def test_what_was_measured_elsewhere_is_ignored_with_one_warning(foreign, caplog):
    tile_cache.update(CARD, {KEY: ENTRY})
    content = json.loads(tile_cache.path().read_text())
    content["entries"][0] |= foreign
    tile_cache.path().write_text(json.dumps(content))
    assert tile_cache.read(CARD) == {}
    assert tile_cache.read(CARD) == {}
    assert len(warnings(caplog)) == 1
    assert "bra-autotune measures anew" in warnings(caplog)[0]


def test_a_folder_in_its_place_is_ignored(caplog):
    tile_cache.path().mkdir()
    assert tile_cache.read(CARD) == {}
    assert len(warnings(caplog)) == 1


def test_a_card_gets_its_own_measurements_before_the_shipped_tiles(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    tile_cache.update(CARD, {KEY: ENTRY})
    tiles.forget()
    try:
        chosen = tiles.choose(tiles.FORWARD, torch.bfloat16, 32, 1600, device)
        shipped = tiles.choose(tiles.FORWARD, torch.bfloat16, 32, 16, device)
    finally:
        tiles.forget()
    assert chosen == ENTRY.tile
    assert shipped == packaged("sm_80").entries[Key(tiles.FORWARD, 16, 32, 16)].tile


def write_many(head_dim, start):
    read_rows = tile_cache._read_rows

    def slowly(source):
        rows = read_rows(source)
        time.sleep(0.02)  # in which another process would write, were it let
        return rows

    tile_cache._read_rows = slowly
    start.wait()
    for size in SIZES:
        tile_cache.update(CARD, {Key(tiles.FORWARD, 16, head_dim, size): ENTRY})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked")
def test_processes_that_tune_at_once_lose_nothing(caplog):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(len(HEAD_DIMS))
    writers = [context.Process(target=write_many, args=(head_dim, start)) for head_dim in HEAD_DIMS]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        tile_cache.read(CARD)  # never sees half a file
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(tile_cache.read(CARD)) == len(HEAD_DIMS) * len(SIZES)
    assert not warnings(caplog)
