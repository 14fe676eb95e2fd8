"""The tuner's timings survive a stopped run and a full disk; damaged lines in their file do no harm."""

import contextlib
import shutil

import pytest
from stopwatch import FORWARD_TINY, TINY, Stopwatch, measure

from bra_triton.bench.tuning import timing
from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import cache as tile_cache


def test_a_stopped_run_goes_on_where_it_was(tried, device):
    first = Stopwatch({tried[0]: 0.5}, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        measure(FORWARD_TINY, first, device)
    assert tile_cache.read(timing.card_name(device)) == {}
    with (tile_cache.folder() / "timings.jsonl").open("a") as file:
        file.write('\n{"trial": "half a li')
    second, third = Stopwatch(), Stopwatch()
    measure(FORWARD_TINY, second, device)
    measure(FORWARD_TINY, third, device)
    assert first.timed + second.timed == tried
    assert third.timed == []
    (entry,) = tile_cache.read(timing.card_name(device)).values()
    assert (entry.tile, entry.cost) == (tried[0], 0.5)


@pytest.mark.parametrize("stop_after", [3, 4, 7])
def test_a_stopped_run_keeps_the_entries_that_it_finished(stop_after, tried, device):
    """Each kernel has three trials. After 3 or 4 timings only the forward is finished (dQ has none or one
    timing); after 7, the forward and dQ (dK/dV has one)."""
    timer = Stopwatch({tried[1]: 0.5}, stop_after)
    with pytest.raises(KeyboardInterrupt):
        measure([*TINY, "--dtype", "float16", "float32"], timer, device)
    read = tile_cache.read(timing.card_name(device))
    finished = [tiles.FORWARD, tiles.QUERY_GRADIENT][: stop_after // len(tried)]
    assert [(key.kernel, key.bits) for key in read] == [(kernel, 16) for kernel in finished]
    assert {entry.tile for entry in read.values()} == {tried[1]}


def test_a_disk_that_fills_up_loses_no_measurement(tried, device, small_disk, monkeypatch, capsys):
    monkeypatch.setenv("BRA_TRITON_CACHE", str(small_disk))
    timer = Stopwatch({tried[1]: 0.5})

    def fill(run):
        with contextlib.suppress(OSError), (small_disk / "other files").open("ab") as file:
            file.write(bytes(16 << 10))
        return timer(run)

    measure(FORWARD_TINY, fill, device)
    said = capsys.readouterr().err
    assert f"cannot write {small_disk}: [Errno 28] No space left on device" in said
    assert (tile_cache.folder() / "timings.jsonl").read_text().strip()
    _check_it_is_kept_aside(tried[1], device, said)


def test_a_folder_that_cannot_be_written_shows_at_once(tried, device, tmp_path, capsys):
    (tmp_path / "cache").write_text("")  # a file where the folder should be: root may write anywhere
    said = []

    def listen(run):
        said.append(capsys.readouterr().err)
        return 1.0

    measure(FORWARD_TINY, listen, device)
    assert f"cannot write {tmp_path / 'cache'}: " in said[0]
    assert (tile_cache.folder() / "timings.jsonl").read_text().count("\n") == len(tried)
    _check_it_is_kept_aside(tried[0], device, said[0])


def _check_it_is_kept_aside(tile, device, said):
    """Checks that the tile is kept in a folder that the warning names, where this process finds it."""
    assert f"is kept in {tile_cache.folder()}" in said
    (entry,) = tile_cache.read(timing.card_name(device)).values()
    assert entry.tile == tile
    shutil.rmtree(tile_cache.folder())


@pytest.mark.parametrize("line", ["", "5", "[]", "{}", '{"trial": []}', 100_000 * "[", "\udcff"])
def test_lines_that_are_no_timings_are_passed_over(line, tried, device):
    first, second = Stopwatch(), Stopwatch()
    measure(FORWARD_TINY, first, device)
    kept = tile_cache.folder() / "timings.jsonl"
    kept.write_text(f"{line}\n{kept.read_text()}", errors="surrogateescape")
    measure(FORWARD_TINY, second, device)
    assert (first.timed, second.timed) == (tried, [])


@pytest.mark.parametrize("milliseconds", ["null", "[]", "1" + 400 * "0", '"fast"'])
def test_a_timing_that_is_no_number_is_measured_again(milliseconds, tried, device):
    measure(FORWARD_TINY, Stopwatch(), device)
    kept = tile_cache.folder() / "timings.jsonl"
    kept.write_text(kept.read_text().replace('"milliseconds": 1.0', f'"milliseconds": {milliseconds}', 1))
    timer = Stopwatch()
    measure(FORWARD_TINY, timer, device)
    assert timer.timed == tried[:1]
