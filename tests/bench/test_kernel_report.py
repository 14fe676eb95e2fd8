"""The kernel report, compiled on one small preset, and that it fails where it must."""

import json
from dataclasses import replace

import pytest

from bra_triton.bench import kernel_report, report_tables
from bra_triton.bench.machine_code import dense_floor
from bra_triton.bench.machine_code.analysis import analyse_all
from bra_triton.bench.machine_code.dense_floor import DenseTile
from bra_triton.bench.machine_code.static_analysis import compile_for, inner_loop, sections
from bra_triton.bench.presets import PRESETS
from bra_triton.kernels import tiles

pytestmark = pytest.mark.compiled
P3 = PRESETS["yolo_p3"]


# Of all tiles with 64 or 128 rows, steps of 32, 64 or 128 and 4 or 8 warps, those whose dense loops take the
# fewest issue slots a score, heads of 32 and 64, on sm_80 or sm_90.
LEANEST_DENSE = {
    "attention_forward": (DenseTile(128, 128, 8, 2, False), DenseTile(128, 128, 4, 2, False)),
    "query_gradient": (
        DenseTile(128, 128, 8, 2, False),
        DenseTile(128, 64, 4, 2, False),
        DenseTile(128, 64, 4, 2, True),
        DenseTile(128, 32, 4, 2, False),
    ),
    "key_value_gradient": (
        DenseTile(128, 64, 8, 2, False),
        DenseTile(128, 64, 4, 2, True),
        DenseTile(64, 64, 2, 2, False),
    ),
}
# And the routed ones, for heads of 32 and 64.
LEANEST = {
    ("attention_forward", "sm_80"): (tiles.Tile(128, 128, 8, 3), tiles.Tile(128, 128, 8, 3)),
    ("attention_forward", "sm_90"): (tiles.Tile(128, 128, 4, 3), tiles.Tile(128, 128, 8, 3)),
    ("query_gradient", "sm_80"): (tiles.Tile(128, 32, 2, 3), tiles.Tile(128, 32, 4, 3)),
    ("query_gradient", "sm_90"): (tiles.Tile(128, 64, 4, 3), tiles.Tile(128, 128, 8, 3)),
    ("key_value_gradient", "sm_80"): (tiles.Tile(64, 64, 2, 3), tiles.Tile(128, 64, 8, 3)),
    ("key_value_gradient", "sm_90"): (tiles.Tile(128, 64, 4, 3), tiles.Tile(64, 64, 4, 3)),
}
KEYS = {"attention_forward": tiles.FORWARD} | {name: name for name in tiles.KERNELS[1:]}


def test_the_report_of_one_preset(tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = [
        "--arch",
        "sm_90",
        "--preset",
        "yolo_p3",
        "--json",
        str(file),
        "--markdown",
        "--workers",
        "1",
    ]
    status = kernel_report.main(arguments)
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert status == int(any(row["failures"] for row in rows))
    assert "| preset" in printed
    by_kernel = {row["kernel"]: row for row in rows}
    for kernel, target in kernel_report.TARGETS.items():
        row = by_kernel[kernel]
        assert row["analysis"]["loop"]["counts"]["exponentials"] > 0
        assert row["target"] == target
        assert row["ratio"] == pytest.approx(row["slots_per_score"] / row["floor"]["slots_per_score"])
        # Padding, tail, prologue and epilogue come on top of the loop.
        assert row["slots_per_useful_score"] > row["slots_per_score"]
        assert row["cost"]["resident_warps"] > 0
        assert kernel in printed
    assert by_kernel["region_means"]["cost"] is None
    work = by_kernel["region_means"]["small"]["work"]
    assert work["bytes_moved"] == 16 * (80 * 80 * 128 * 2 + 64 * 128 * 4)


def test_a_spill_fails_the_report(monkeypatch, capsys):
    """The tile that tests/kernels/test_compile.py spills with."""
    monkeypatch.setattr(tiles, "choose", lambda *arguments: tiles.Tile(64, 64, 1, 1))
    kernels_only(monkeypatch, "key_value_gradient")
    assert kernel_report.main(["--arch", "sm_80", "--preset", "yolo_p3", "--workers", "1"]) == 1
    assert "yolo_p3, sm_80, key_value_gradient" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("kernel", kernel_report.TARGETS)
@pytest.mark.parametrize("arch", kernel_report.TARGET_ARCHITECTURES)
def test_shipped_configurations_meet_their_targets_and_do_not_spill(arch, kernel, capsys, monkeypatch):
    """Beside dense loops in the same tiles, compiled anew: what makes a routed loop dearer fails here."""
    kernels_only(monkeypatch, kernel)
    arguments = ["--arch", arch, "--preset", "yolo_p3", "yolo_p3_head64", "--workers", "1"]
    assert kernel_report.main(arguments) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count(" met") >= 2


@pytest.mark.parametrize("head", [0, 1], ids=["32", "64"])
@pytest.mark.parametrize(("kernel", "arch"), LEANEST)
def test_the_leanest_loops_are_as_lean_as_dense_ones(kernel, arch, head):
    """Whatever tile each of the two takes, and without spills."""
    preset, name = PRESETS[("yolo_p3", "yolo_p3_head64")[head]], (kernel, (32, 64)[head], arch, "")
    with tiles.use_tiles({KEYS[kernel]: LEANEST[kernel, arch][head]}):
        launched = kernel_report.shipped(preset, kernel_report.DTYPES["float16"], arch)
    (specimen,) = [x.specimen for x in launched if x.specimen.name == kernel]
    (routed,) = analyse_all([(specimen, arch)])
    floor = dense_floor.find_floors({name: LEANEST_DENSE[kernel]})[name]
    assert not routed.usage.spills
    assert routed.slots_per_score <= kernel_report.TARGETS[kernel] * floor.slots_per_score


def test_where_the_exponential_unit_binds_a_share_of_it_is_tried(monkeypatch):
    """dQ of large maps on sm_90; not dK/dV, nor where something else binds."""
    kernels_only(monkeypatch, "query_gradient")
    monkeypatch.setattr(dense_floor, "find_floors", lambda *arguments: {})
    presets = [PRESETS["high_resolution"], PRESETS["yolo_p4"]]
    large, small = kernel_report.collect(presets, ["sm_90"])
    assert large.cost.binding == "exponential" != small.cost.binding
    assert small.shared is None
    before, after = (code.loop.counts["exponentials"] for code in (large.analysis, large.shared.analysis))
    assert after == before - before // kernel_report.EXP_SHARE
    assert large.shared.analysis.slots_per_score > large.analysis.slots_per_score
    assert "by multiply-adds" in report_tables.render([large, small])


def test_a_missed_target_fails_the_report_and_a_met_one_does_not(monkeypatch, capsys):
    kernels_only(monkeypatch, "key_value_gradient")
    arguments = ["--arch", "sm_80", "--preset", "yolo_p3", "--workers", "1"]
    monkeypatch.setitem(kernel_report.TARGETS, "key_value_gradient", 0.5)
    assert kernel_report.main(arguments) == 1
    assert "times the dense floor, target 0.5" in capsys.readouterr().out
    monkeypatch.setitem(kernel_report.TARGETS, "key_value_gradient", 5.0)
    assert kernel_report.main(arguments) == 0
    assert "All targets are met" in capsys.readouterr().out


def kernels_only(monkeypatch, *names):
    shipped = kernel_report.shipped
    monkeypatch.setattr(
        kernel_report,
        "shipped",
        lambda *arguments: [x for x in shipped(*arguments) if x.specimen.name in names],
    )


def row(**changes):
    """A row without counts: the kernel did not compile."""
    nothing = dict.fromkeys(("analysis", "cost", "small", "floor", "target"))
    return kernel_report.Row("p", "sm_80", "attention_forward", error="no", checked=True, **nothing | changes)


def test_what_does_not_compile_fails_the_report():
    assert row().failures == ["p, sm_80, attention_forward: does not compile: no"]


def test_a_target_without_a_floor_fails_the_report():
    specimen = dense_floor.specimen("attention_forward", 32, "fp16", DenseTile(64, 64, 4, 2, False))
    (analysis,) = analyse_all([(specimen, "sm_80")])
    assert "no spill-free dense floor" in row(analysis=analysis, target=1.08).failures[0]
    assert row(analysis=analysis).failures == []


def test_targets_are_for_large_regions_half_precision_and_two_architectures():
    targets = {
        (name, arch, dtype): kernel_report.target_of("query_gradient", PRESETS[name], arch, dtype)
        for name in ("yolo_p3", "yolo_p4", "high_resolution_head64")
        for arch in ("sm_80", "sm_120")
        for dtype in ("float16", "float32")
    }
    assert {key for key, target in targets.items() if target is not None} == {
        ("yolo_p3", "sm_80", "float16"),
        ("high_resolution_head64", "sm_80", "float16"),
    }


def test_other_processes_compile_the_same_and_errors_come_back():
    good = dense_floor.specimen("attention_forward", 32, "fp16", DenseTile(32, 32, 2, 2, False))
    bad = replace(good, constexprs={})
    other = replace(good, num_warps=1)
    jobs = [(good, "sm_80"), (bad, "sm_80"), (other, "sm_80"), (good, "sm_80")]
    first, error, second, again = analyse_all(jobs, workers=2)
    assert first is again
    assert isinstance(error, RuntimeError)
    assert "takes [" in str(error)
    assert first.slots_per_score != second.slots_per_score
    assert first.loop == inner_loop(compile_for(good, "sm_80"))


def test_the_sections_of_a_kernel_as_launched():
    """With a tile whose tap loop the compiler keeps; with others it unrolls the taps into the rest."""
    with tiles.use_tiles({tiles.FORWARD: tiles.Tile(128, 64, 4, 3)}):
        launched = kernel_report.shipped(P3, kernel_report.DTYPES["float16"], "sm_80")
    specimen = next(x.specimen for x in launched if x.specimen.name == "attention_forward")
    found = sections(compile_for(specimen, "sm_80"))
    # The tail takes the same products in narrower steps, a tap of LePE none.
    assert 0 < found.tail.counts["matrix"] < found.loop.counts["matrix"]
    assert found.taps.counts["matrix"] == 0 < found.taps.counts["global_loads"]
    assert found.taps.counts["fp32"] >= 32 * 128 // (
        32 * specimen.num_warps
    )  # a head's channels of 128 tokens
    assert found.rest.counts["matrix"] == 0 < found.rest.counts["global_stores"]
    assert found.loop.counts["global_stores"] == 0
