"""The user's cache of measured tiles: which entries are used, which are ignored; simultaneous writers."""

import json
import logging
import multiprocessing
import os
import pwd
import tempfile
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from properties import profile

from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import cache as tile_cache
from bra_triton.kernels.tiles.table import HEAD_DIMS, SIZES, Entry, Key, Tile, entry_row, packaged

CARD = "NVIDIA H100 80GB HBM3"
KEY, OTHER = Key(tiles.FORWARD, 16, 32, 128), Key(tiles.QUERY_GRADIENT, 32, 64, 16)
ENTRY = Entry(Tile(128, 32, 8, 5), 0.25)


def row_of(key, card=CARD):
    return tile_cache.circumstances(card, key.kernel) | entry_row(key, ENTRY)


def file_of(*rows):
    return json.dumps({"format": 1, "entries": rows})


def nested(depth):
    """JSON of nested arrays: `depth` 500 can be parsed, 200,000 cannot."""
    return depth * "[" + depth * "]"


ROW, FOREIGN = row_of(KEY), row_of(KEY, "another card")


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


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BRA_TRITON_CACHE", "~/tiles")
    assert tile_cache.path() == tmp_path / "tiles" / "tuned.json"


@pytest.mark.parametrize("given", ["", "~/tiles"])
def test_without_a_home_folder_it_is_in_that_for_temporary_files(given, monkeypatch, tmp_path, caplog):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BRA_TRITON_CACHE", given)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tile_cache.read(CARD) == {}
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}
    (warning,) = warnings(caplog)
    assert str(tmp_path / "bra_triton" / "tuned.json") in warning
    assert "home" in warning


def test_no_cache_is_no_news(caplog):
    assert tile_cache.read(CARD) == {}
    assert not warnings(caplog)


def test_what_is_written_is_read():
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}
    assert [file.suffix for file in sorted(tile_cache.folder().iterdir())] == [".json", ".lock"]


def test_an_update_replaces_its_own_keys_alone():
    tile_cache.update(CARD, {KEY: Entry(Tile(16, 16, 1, 1)), OTHER: ENTRY})
    tile_cache.update("another card", {KEY: Entry(Tile(32, 32, 2, 2))})
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY, OTHER: ENTRY}
    assert tile_cache.read("another card")[KEY].tile == Tile(32, 32, 2, 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("no json", "Expecting value"),
        ("[]", "must be a JSON object, got []"),
        ("{}", "lacks the field 'format'"),
        ('{"format": 1}', "lacks the field 'entries'"),
        ('{"format": 1, "entries": 5}', "got 5"),
        ('{"format": 2, "entries": [1, 2, 3]}', "its format is 2, not 1"),
        (nested(200_000), "recursion"),
        (b"\xff, garbage", "can't decode"),
        *((file_of(ROW, ROW)[: int(share * 500)], "") for share in (0.1, 0.5, 0.9, 0.99)),
        (file_of(ROW) + 60_000_000 * " ", "more than 8 MiB"),
    ],
    ids=lambda given: repr(given[:20]),
)
def test_a_file_that_is_not_understood_is_set_aside_with_one_warning(content, reason, caplog):
    content = content if isinstance(content, bytes) else content.encode()
    file = tile_cache.path()
    for name in ("tuned.1.json", "tuned.2.json"):
        caplog.clear()
        tile_cache._warned.clear()
        file.write_bytes(content)
        assert tile_cache.read(CARD) == tile_cache.read(CARD) == {}
        (warning,) = warnings(caplog)
        assert str(file) in warning
        assert reason in warning
        tile_cache.update(CARD, {KEY: ENTRY})
        assert tile_cache.read(CARD) == {KEY: ENTRY}
        assert (file.parent / name).read_bytes() == content
        assert name in warnings(caplog)[-1]
        assert reason in warnings(caplog)[-1]


def test_a_link_to_itself_stops_nothing(caplog):
    tile_cache.path().symlink_to(tile_cache.path())
    assert tile_cache.read(CARD) == {}
    (warning,) = warnings(caplog)
    assert str(tile_cache.path()) in warning
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}


def test_a_folder_that_is_a_file_stops_no_launch(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BRA_TRITON_CACHE", str(tmp_path / "file"))
    assert tile_cache.read(CARD) == {}
    (warning,) = warnings(caplog)
    assert str(tile_cache.path()) in warning
    with pytest.raises(OSError, match="file"):
        tile_cache.update(CARD, {KEY: ENTRY})


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_set_aside(make, caplog):
    make(tile_cache.path())
    assert tile_cache.read(CARD) == tile_cache.read(CARD) == {}
    (warning,) = warnings(caplog)
    assert f"{tile_cache.path()}, which is not a readable cache of tiles: it is not a file" in warning
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}
    assert (tile_cache.folder() / "tuned.1.json").exists()


def test_a_file_that_would_become_too_large_is_set_aside(monkeypatch, caplog):
    content = file_of(FOREIGN)
    tile_cache.path().write_text(content)
    monkeypatch.setattr(tile_cache, "LARGEST", len(content) + 100)
    tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {KEY: ENTRY}
    assert (tile_cache.folder() / "tuned.1.json").read_text() == content
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *((row, "an entry must be a JSON object") for row in (5, None, [], "row", json.loads(nested(500)))),
        ({}, "lacks the field 'card'"),
        (ROW | {"card": [CARD]}, "must have a 'card' of type str"),
        (ROW | {"source": {}}, "must have a 'source' of type str"),
        (ROW | {"kernel": "sideways"}, "kernel must be one of"),
        (ROW | {"head_dim": 48}, "head_dim must be one of"),
        (ROW | {"own": 48}, "own must be a power of two"),
        (ROW | {"own": 2**40}, "own must be a power of two from 16 to 256"),
        (ROW | {"num_warps": "4"}, "must have a 'num_warps' of type int"),
        (ROW | {"num_stages": 10**400}, "num_stages must be an int from 1 to 8"),
        (ROW | {"cost": 10**400}, "int too large to convert to float"),
        (ROW | {"options": {"new": 1}}, "the unknown option 'new'"),
        (ROW | {"options": {"exp_share": [2]}}, "exp_share must be a power of two"),
    ],
    ids=lambda given: str(given)[-40:],
)
def test_an_entry_that_is_not_understood_is_kept_and_spoils_no_other(row, reason, caplog):
    rest = [row_of(OTHER), FOREIGN]
    head = {"format": 1, "written_by": "a newer version"}
    tile_cache.path().write_text(json.dumps(head | {"entries": [row, *rest]}))
    assert tile_cache.read(CARD) == tile_cache.read(CARD) == {OTHER: ENTRY}
    (warning,) = warnings(caplog)
    assert f"ignoring 1 of 3 entries of {tile_cache.path()}" in warning
    assert reason in warning
    assert len(warning) < 1200
    tile_cache.update(CARD, {KEY: ENTRY, OTHER: ENTRY})
    content = json.loads(tile_cache.path().read_text())
    assert content == head | {"entries": [row, FOREIGN, ROW, row_of(OTHER)]}
    assert tile_cache.read(CARD) == {KEY: ENTRY, OTHER: ENTRY}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
HUGE = st.sampled_from([2**40, 2**64, 10**400, -(10**400), 1e308, json.loads(nested(300))])
JSON = st.recursive(
    SCALARS | HUGE, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=8
)
KEYS = st.builds(Key, *map(st.sampled_from, (tiles.KERNELS, tiles.BITS, HEAD_DIMS, SIZES, tiles.FORMS)))
VALID = st.builds(row_of, KEYS, st.sampled_from([CARD, "another card"]))
CHANGED = st.builds(
    lambda row, name, value: row | {name: value}, VALID, st.sampled_from([*ROW, "measured_on", "new"]), JSON
)
# Entries, each with True if the cache must understand it, None if it cannot, False if either may happen.
ENTRIES = st.lists(
    st.tuples(VALID, st.just(True))
    | st.tuples(CHANGED, st.just(False))
    | st.tuples(SCALARS | st.lists(JSON), st.none()),
    max_size=6,
)


@profile(300)
@given(
    entries=ENTRIES,
    whole=JSON,
    is_cache=st.sampled_from([True, True, False]),
    cut=st.sampled_from([0, 0, 0, -1]),
)
@example(entries=[], whole={"format": 2, "entries": [1]}, is_cache=False, cut=0)
def test_no_content_raises_or_is_lost(entries, whole, is_cache, cut):
    """Draws a cache with entries of all kinds, or any JSON; sometimes the last character is missing."""
    rows = [row for row, _ in entries]
    text = json.dumps({"format": 1, "entries": rows} if is_cache else whole)
    text = text[: len(text) + cut]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        said = []
        patch.setenv("BRA_TRITON_CACHE", folder)
        patch.setattr(tile_cache, "_warned", set())
        patch.setattr(tile_cache.logger, "warning", said.append)
        tile_cache.path().write_text(text)
        before = tile_cache.read(CARD)
        assert len(said) <= 1
        assert all(str(tile_cache.path()) in message for message in said)
        tile_cache.update(CARD, {KEY: ENTRY})
        assert tile_cache.read(CARD) == before | {KEY: ENTRY}
        if not is_cache or cut:
            assert len(said) == 2  # when it was read, and when it was set aside
            assert (tile_cache.folder() / "tuned.1.json").read_text() == text
            return
        assert said or all(kind is not None for _, kind in entries)
        good = [row for row, kind in entries if kind and row["card"] == CARD]
        assert {json.dumps(row) for row in good} <= {json.dumps(row_of(key)) for key in before}
        kept = list(map(json.dumps, json.loads(tile_cache.path().read_text())["entries"]))
        assert set(map(json.dumps, (row for row in rows if not is_replaced(row)))) <= {*kept, json.dumps(ROW)}


def is_replaced(row):
    """Whether an update of `KEY` may drop an entry: it names the same circumstances and key."""
    names = (*tile_cache.circumstances(CARD, KEY.kernel), "kernel", "bits", "head_dim", "size", "form")
    return isinstance(row, dict) and all(row.get(name) == ROW[name] for name in names)


def test_a_write_that_fails_changes_nothing(monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    tile_cache.update(CARD, {OTHER: ENTRY})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tile_cache.update(CARD, {KEY: ENTRY})
    assert tile_cache.read(CARD) == {OTHER: ENTRY}
    assert [file.suffix for file in sorted(tile_cache.folder().iterdir())] == [".json", ".lock"]


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
    assert "run bra-autotune to measure" in warnings(caplog)[0]


def test_a_card_gets_its_own_measurements_before_the_shipped_tiles(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    try:
        for entry in (ENTRY, replace(ENTRY, tile=replace(ENTRY.tile, num_warps=1))):
            tile_cache.update(CARD, {KEY: entry})
            tiles.forget()
            assert tiles.choose(tiles.FORWARD, torch.bfloat16, 32, 1600, device) == entry.tile
        shipped = tiles.choose(tiles.FORWARD, torch.bfloat16, 32, 16, device)
    finally:
        tiles.forget()
    assert shipped == packaged("sm_80").entries[Key(tiles.FORWARD, 16, 32, 16)].tile


def write_many(head_dim, start):
    read_content = tile_cache._read_content

    def slowly(source):
        content = read_content(source)
        time.sleep(0.02)  # without the lock, another process would write now
        return content

    tile_cache._read_content = slowly
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
        tile_cache.read(CARD)  # must never see half a file
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(tile_cache.read(CARD)) == len(HEAD_DIMS) * len(SIZES)
    assert not warnings(caplog)
