"""`bra-bench peers --preset cpu` on tiny maps: what it measures, checks and fails at."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bra_triton import BiLevelRoutingAttention
from bra_triton.bench import models, modules_alone, peer_times
from bra_triton.bench.problems import PROBLEMS

TINY = replace(PROBLEMS["tiny"], side_dwconv=5)


def test_maps_of_the_preset_are_what_the_targets_are_about():
    assert [str(problem) for problem in modules_alone.PRESET.values()] == [
        "8x56x56x64 heads 2 n_win 7 topk 1",
        "8x28x28x128 heads 4 n_win 7 topk 4",
        "8x14x14x256 heads 8 n_win 7 topk 16",
        "2x80x80x64 heads 2 n_win 8 topk 4",
        "2x40x40x128 heads 4 n_win 8 topk 4",
        "2x20x20x256 heads 8 n_win 5 topk 4",
        "1x160x160x64 heads 2 n_win 8 topk 4",
    ]


@pytest.mark.parametrize(
    ("dtype", "factor", "status"), [("float32", 9.0, 0), ("float32", 2.0, 1), ("bfloat16", 2.0, 0)]
)
def test_status_and_table(dtype, factor, status, monkeypatch, capsys):
    """Made-up times replace the measured ones: the reference takes two or nine times as long as `fused`.

    Targets are for float32 alone.
    """
    monkeypatch.setattr(modules_alone, "PRESET", {"tiny": TINY})
    seconds = {"fused": 1.0, "reference": factor}
    monkeypatch.setattr(modules_alone.measure, "interleaved_minima", lambda *arguments, **options: seconds)
    monkeypatch.setattr(
        modules_alone, "_in_fresh_process", lambda *arguments: {"fused": 1, "reference": 4}[arguments[-1]]
    )
    assert peer_times.main(["--preset", "cpu", "--repeats", "1", "--dtype", dtype]) == status
    out = capsys.readouterr().out
    assert f"CPU, {dtype}" in out
    assert f"forward: geometric mean {factor:.2f}" in out
    assert ("MISSED" in out) == bool(status)
    assert ("target" in out) == (dtype == "float32")


@pytest.mark.parametrize(
    "given",
    [["--problem", "yolo_p3"], ["--batch", "2"], ["--peers", "dense"], ["--check-only"], ["--json", "x"]],
)
def test_what_the_preset_sets_cannot_be_set(given, capsys):
    with pytest.raises(SystemExit):
        peer_times.main(["--preset", "cpu", *given])
    assert f"{given[0]} has no effect with --preset, which sets what is measured" in capsys.readouterr().err


def test_both_run_and_are_measured(monkeypatch):
    def in_this_process(function, *arguments):
        function(*arguments)
        return 900

    monkeypatch.setattr(modules_alone, "_in_fresh_process", in_this_process)
    found = models.ratios(modules_alone.measure_module(TINY, 1, torch.float32))
    assert min(found.values()) > 0


def test_what_a_step_takes_is_measured_in_a_process_of_its_own():
    """A map of 64 x 64 x 32 float32 is 512 KiB; a step holds several."""
    larger = replace(TINY, height=64, width=64)
    assert (
        modules_alone._in_fresh_process(modules_alone._step_bytes, larger, torch.float32, models.FUSED)
        > 2**20
    )


def test_what_computes_something_else_is_not_timed(monkeypatch):
    made = []

    def spoiled(*arguments, **options):
        made.append(BiLevelRoutingAttention(*arguments, **options))
        if len(made) == 2:
            nn.init.zeros_(made[1].wo.weight)
        return made[-1]

    monkeypatch.setattr(modules_alone, "BiLevelRoutingAttention", spoiled)
    with pytest.raises(RuntimeError, match="the gradient on the fused backend is off by"):
        modules_alone.measure_module(TINY, 1, torch.float32)
