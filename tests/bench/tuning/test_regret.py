"""What the cost model's choice costs against timings: read, judged, compared."""

import json
import math
from pathlib import Path

import pytest
import torch

from bra_triton.bench.machine_code.cost_model import Cost
from bra_triton.bench.machine_code.launches import Setting
from bra_triton.bench.tuning import regret, timing
from bra_triton.bench.tuning.timing import Trial
from bra_triton.kernels.tiles import FORWARD, Tile
from bra_triton.kernels.tiles import table as tile_table

SETTING = Setting(16, 80, 80, 8, 4, 2, 32, 32)
FEW_SLOTS, MANY_WARPS, WITH_OPTIONS = (
    Tile(128, 128, 4, 2),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 2, exp_share=8, fuses_lepe=False),
)


def trial(tile, setting=SETTING):
    return Trial(setting, torch.float16, FORWARD, tile)


def line(trial, milliseconds):
    return json.dumps({"trial": str(trial), "milliseconds": milliseconds})


def timed(tile, milliseconds, slots, warps):
    return regret.Timed(trial(tile), milliseconds, Cost(1, slots, 0, 0, {}, 0.0, warps))


def test_what_the_tuner_writes_is_read_but_for_refusals():
    refused = trial(Tile(32, 32, 1, 2))
    lines = [line(trial(FEW_SLOTS), 1.5), line(trial(WITH_OPTIONS), 1.0), line(refused, math.inf)]
    assert regret.read(lines) == {trial(FEW_SLOTS): 1.5, trial(WITH_OPTIONS): 1.0}
    assert [regret.is_ranked(tile) for tile in (FEW_SLOTS, WITH_OPTIONS)] == [True, False]
    with pytest.raises(ValueError, match="no trial: 'nonsense'"):
        regret.read([json.dumps({"trial": "nonsense", "milliseconds": 1.0})])


def test_warps_that_wait_change_what_the_model_prefers():
    judged = [timed(FEW_SLOTS, 1.3, slots=6.6, warps=8), timed(MANY_WARPS, 1.0, slots=8.0, warps=16)]
    (by_slots,), (with_latency,) = (regret.preferred(judged, value).values() for value in (0, 8))
    assert (by_slots.trial.tile, with_latency.trial.tile) == (FEW_SLOTS, MANY_WARPS)


def test_the_losses_are_against_the_fastest_of_the_same_problem(tmp_path, monkeypatch, capsys):
    """The other problem has one configuration, which cannot lose."""
    other = trial(MANY_WARPS, Setting(4, 160, 160, 8, 4, 2, 32, 32))
    file = tmp_path / "timings.jsonl"
    lines = (line(trial(FEW_SLOTS), 1.21), line(trial(MANY_WARPS), 1.0), line(other, 7.0))
    file.write_text("\n".join(lines))

    def judge(timings, *arguments):
        cost = {FEW_SLOTS: Cost(1, 6.6, 0, 0, {}, 0.0, 8), MANY_WARPS: Cost(1, 8.0, 0, 0, {}, 0.0, 16)}
        return [regret.Timed(each, time, cost[each.tile]) for each, time in timings.items()]

    monkeypatch.setattr(regret, "judge", judge)
    assert regret.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "LATENCY_WARPS  0: 10.0% on average, 21.0% at most" in printed
    assert "LATENCY_WARPS  8: 0.0% on average, 0.0% at most" in printed
    assert "16x80x80x64 topk 4 torch.float16 forward: 64x64 4w 2s, 0.0% over the fastest" in printed


@pytest.mark.compiled
def test_the_model_judges_what_compiles_without_spills(tmp_path):
    """64 x 64 scores and their sums do not fit the registers of one warp's threads."""
    dense = trial(Tile(64, 64, 4, 3), Setting(2, 8, 8, 2, 4, 2, 64, 64))
    spilling = trial(Tile(64, 64, 1, 3), dense.setting)
    (timed,) = regret.judge({dense: 1.0, spilling: 2.0}, "sm_90", tmp_path, 1)
    assert timed.trial == dense
    # All 64 tokens of an image attend to each other.
    assert timed.cost.useful_scores == 2 * 2 * 64 * 64
    assert 0 < timed.ranked_by(0) < timed.ranked_by(8) < math.inf


def test_without_room_for_a_block_the_cost_is_infinite():
    assert timed(FEW_SLOTS, 1.0, slots=6.0, warps=0).ranked_by(8) == math.inf


def test_what_the_shipped_table_says_was_measured_is_in_the_timings_kept():
    """With its mean time, at most 8 % over the fastest, which is left out if it spills under Triton 3.8."""
    text = (Path(__file__).parents[3] / "docs" / "measured" / "h200-timings.jsonl").read_text()
    means = timing.means(regret.read(text.splitlines()))
    entries = {key: e for key, e in tile_table.packaged("sm_90").entries.items() if e.measured_on}
    assert set(entries) == set(means)
    for key, entry in entries.items():
        assert entry.cost == pytest.approx(means[key][entry.tile], abs=1e-4), key
        assert entry.cost < 1.08 * min(means[key].values()), key
