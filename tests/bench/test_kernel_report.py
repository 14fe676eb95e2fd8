"""The kernel report of a few problems, and the conditions under which it fails."""

from dataclasses import replace

import pytest

from bra_triton.bench import kernel_report
from bra_triton.bench.machine_code.launches import KERNEL_NAMES, kernel_name, variant
from bra_triton.bench.machine_code.static_analysis import (
    Analysis,
    analyse,
    compile_for,
    in_processes,
    sections,
)
from bra_triton.bench.problems import PROBLEMS
from bra_triton.kernels import forms, tiles

pytestmark = pytest.mark.compiled
ONE_PROBLEM = ["--problem", "yolo_p3", "--workers", "1"]


@pytest.fixture(scope="module", autouse=True)
def _each_is_analysed_once():
    """Tests of this module share kernels, as the problems of a report do."""
    found = {}

    def analyse_once(launch, arch):
        key = variant(launch), arch
        if key not in found:
            found[key] = analyse(launch, arch)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_report, "analyse", analyse_once)
        yield


@pytest.fixture(scope="module")
def launches():
    """The kernels of YOLO's P3 in float16 on sm_80, by name."""
    launched = kernel_report.shipped(PROBLEMS["yolo_p3"], kernel_report.DTYPES["float16"], "sm_80")
    return {kernel_name(launch): launch for launch in launched}


def test_the_report_of_one_problem(capsys):
    status = kernel_report.main(["--arch", "sm_90", *ONE_PROBLEM])
    printed = capsys.readouterr().out
    rows = kernel_report.collect([PROBLEMS["yolo_p3"]], ["sm_90"])
    assert status == int(any(row.failures for row in rows))
    assert "| problem" in printed
    by_kernel = {row.kernel: row for row in rows}
    for kernel in KERNEL_NAMES.values():
        row = by_kernel[kernel]
        assert row.analysis.loop["exp"] > 0
        assert row.target == kernel_report.TARGETS[kernel, "sm_90"][32]
        # Padding, tail, prologue and epilogue come on top of the loop.
        assert row.cost.slots_per_useful_score > row.analysis.slots_per_score
        assert row.cost.resident_warps > 0
        assert kernel in printed
    means = by_kernel["region_means"]
    assert means.cost is None
    assert means.bytes_of_arguments == 16 * (80 * 80 * 192 * 2 + 64 * 128 * 4)
    assert means.binding == "memory"
    # 320 channels: packed projection (192), output (64), and the output without LePE (64), which the backward
    # reads. The rest is lists and statistics.
    assert 1 < by_kernel["attention_forward"].bytes_of_arguments / (16 * 80 * 80 * 320 * 2) < 1.1


def test_small_maps_are_reported_in_both_forms(monkeypatch):
    """BiFormer's stage 2: the small-map kernel, which is launched, and the routed form in its place."""
    kernels_only(monkeypatch, "small_map_forward", "attention_forward")
    (small,) = kernel_report.collect([PROBLEMS["biformer_stage2"]], ["sm_90"])
    with forms.use_form("routed"):
        (listed,) = kernel_report.collect([PROBLEMS["biformer_stage2"]], ["sm_90"])
    assert [row.kernel for row in (small, listed)] == ["small_map_forward", "attention_forward"]
    assert small.cost.useful_scores == listed.cost.useful_scores
    # The kernels cost about the same: the small-map form saves launches.
    assert 0.5 < small.cost.issue_slots / listed.cost.issue_slots < 1.5
    assert small.analysis.loop != listed.analysis.loop
    assert not small.failures


@pytest.mark.parametrize("kernel", KERNEL_NAMES.values())
@pytest.mark.parametrize("arch", kernel_report.CHECKED_ARCHITECTURES)
def test_shipped_configurations_meet_their_targets_and_do_not_spill(arch, kernel, capsys, monkeypatch):
    """A change that makes the loop of a routed kernel more expensive fails here."""
    kernels_only(monkeypatch, kernel)
    arguments = ["--arch", arch, "--problem", "yolo_p3", "yolo_p3_head64", "--workers", "1"]
    assert kernel_report.main(arguments) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count(" met") >= 2


def test_a_spill_fails_the_report(monkeypatch, capsys):
    """With the tile that also spills in tests/kernels/test_compile.py."""
    monkeypatch.setattr(tiles, "choose", lambda *arguments: tiles.Tile(64, 64, 1, 1))
    kernels_only(monkeypatch, "key_value_gradient")
    assert kernel_report.main(["--arch", "sm_80", *ONE_PROBLEM]) == 1
    assert "yolo_p3, sm_80, key_value_gradient: " in capsys.readouterr().out
    (row,) = kernel_report.collect([PROBLEMS["yolo_p3"]], ["sm_80"])
    assert any("instructions spill" in failure for failure in row.failures)


def test_a_missed_target_fails_the_report(monkeypatch, capsys):
    kernels_only(monkeypatch, "key_value_gradient")
    monkeypatch.setitem(kernel_report.TARGETS, ("key_value_gradient", "sm_80"), {32: 0.5})
    assert kernel_report.main(["--arch", "sm_80", *ONE_PROBLEM]) == 1
    assert "issue slots per score, target 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("arch", kernel_report.CHECKED_ARCHITECTURES)
def test_attention_of_small_maps_is_predicted_to_be_no_slower_than_dense(arch, monkeypatch, capsys):
    # Without LePE, as where dense attention is compared: the report below then needs no other kernels.
    without = replace(PROBLEMS["yolo_p4"], side_dwconv=0)
    monkeypatch.setattr(kernel_report, "REPORTED", {"yolo_p4": without})
    names = list(kernel_report.MOST_BESIDE_DENSE)
    found = kernel_report.compare_with_dense([PROBLEMS[name] for name in names], [arch])
    assert [(row.problem.name, row.direction) for row in found] == [
        (name, direction) for name in names for direction in ("forward", "backward")
    ]
    assert not [failure for row in found for failure in row.failures]
    # On P4, dense attention computes 16 times as many scores as routed attention, in larger tiles.
    assert 0.1 < found[0].ratio < 0.4
    monkeypatch.setitem(kernel_report.MOST_BESIDE_DENSE, "yolo_p4", 0.1)
    assert kernel_report.main(["--arch", arch, "--problem", "yolo_p4", "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"yolo_p4, {arch}, forward: {found[0].ratio:.2f} times as long as dense attention" in printed
    assert printed.count("0.1 MISSED") == 2


def test_modes_are_not_compared_with_dense_attention():
    modes = [PROBLEMS[name] for name in ("yolo_p3_soft", "yolo_p3_meanpool")]
    assert kernel_report.compare_with_dense(modes, ["sm_90"]) == []


def kernels_only(monkeypatch, *names):
    """Limits the report to these kernels, without the comparison with dense attention."""
    monkeypatch.setattr(kernel_report, "compare_with_dense", lambda *arguments: [])
    shipped = kernel_report.shipped
    monkeypatch.setattr(
        kernel_report,
        "shipped",
        lambda *arguments: [x for x in shipped(*arguments) if kernel_name(x) in names],
    )


def test_what_does_not_compile_stops_the_report(monkeypatch):
    def broken(launch, arch):
        raise ValueError("no")

    monkeypatch.setattr(kernel_report, "analyse", broken)
    with pytest.raises(RuntimeError, match=r"yolo_p3, sm_80, \w+ does not compile: ValueError: no"):
        kernel_report.main(["--arch", "sm_80", *ONE_PROBLEM])


def test_targets_are_for_large_regions_half_precision_and_two_architectures():
    targets = {
        (name, arch, dtype): kernel_report.Row(
            PROBLEMS[name], dtype, arch, "query_gradient", 1, 0, None
        ).target
        for name in ("yolo_p3", "yolo_p4", "yolo_p3_soft", "high_resolution_head64")
        for arch in ("sm_80", "sm_120")
        for dtype in ("float16", "float32")
    }
    assert {key for key, target in targets.items() if target is not None} == {
        ("yolo_p3", "sm_80", "float16"),
        ("high_resolution_head64", "sm_80", "float16"),
    }


def test_other_processes_compile_the_same_and_errors_come_back(launches):
    good, other = launches["route"], launches["invert_graph"]
    bad = replace(good, numbers=())
    jobs = {"good": (good, "sm_80"), "bad": (bad, "sm_80"), "other": (other, "sm_80")}
    found = in_processes(analyse, jobs, workers=2)
    assert list(found) == list(jobs)
    assert isinstance(found["bad"], RuntimeError)
    assert "missing" in str(found["bad"])
    assert isinstance(found["other"], Analysis)
    assert found["good"].rest == sections(compile_for(good, "sm_80")).rest != found["other"].rest


def test_the_sections_of_a_kernel_as_launched():
    """With a tile for which the compiler keeps the loop over LePE's taps; for others it unrolls the loop, and
    the taps count as `rest`."""
    with tiles.use_tiles({tiles.FORWARD: tiles.Tile(128, 64, 4, 3)}):
        launched = kernel_report.shipped(PROBLEMS["yolo_p3"], kernel_report.DTYPES["float16"], "sm_80")
    launch = next(x for x in launched if kernel_name(x) == "attention_forward")
    found = sections(compile_for(launch, "sm_80"))
    # The loop over the tail has the same matrix products in narrower steps, the loop over LePE's taps none.
    assert 0 < found.tail["matrix"] < found.loop["matrix"]
    assert found.taps["matrix"] == 0 < found.taps["loads"]
    # At least one multiply-add for each of 32 channels (one head) of 128 tokens.
    assert found.taps["fp32"] >= 32 * 128 // (32 * launch.options["num_warps"])
    assert found.rest["matrix"] == 0
