"""`bra-bench kernel-times` compares measured and predicted times; here measured times are given, no GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from bra_triton.bench import kernel_report, kernel_times
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.problems import PROBLEMS


def row(seconds, kernel="route"):
    moved = round(seconds * HARDWARE["sm_90"].bandwidth)
    return kernel_report.Row(
        PROBLEMS["tiny"], "float16", "sm_90", kernel, 1, moved, SimpleNamespace(loop=None)
    )


@pytest.mark.parametrize("seen", [True, False])
def test_the_command_prints_every_kernel_and_fails_for_one_that_was_not_seen(
    seen, monkeypatch, tmp_path, capsys
):
    problem = PROBLEMS["yolo_p3"]
    rows = [row(1e-6, name)._replace(problem=problem) for name in ("route", "invert_graph")]
    times = {"route": [2e-6], **({"invert_graph": [1e-6]} if seen else {})}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_times.tiles, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(kernel_times.kernel_report, "collect", lambda *arguments: rows)
    monkeypatch.setattr(kernel_times, "times_of", lambda *arguments: times)
    monkeypatch.setattr(kernel_times.measure, "circumstances", lambda device: {"card": "a card"})
    file = tmp_path / "times.json"
    assert kernel_times.main(["--problem", "yolo_p3", "--json", str(file)]) == int(not seen)
    printed = capsys.readouterr().out
    assert "card a card" in printed
    assert ("not seen on the GPU: yolo_p3: invert_graph" in printed) == (not seen)
    assert [line["ratio"] for line in json.loads(file.read_text())["kernels"]] == [2.0, 1.0 if seen else None]


def test_the_median_launch_beside_the_bound_that_binds():
    assert kernel_times.compare(row(2e-6), [9e-6, 3e-6, 4e-6]) == {
        **{"problem": "tiny", "kernel": "route", "tile": ""},
        **{"measured us": 4.0, "predicted us": 2.0, "binds": "memory", "ratio": 2.0},
    }


def test_what_was_not_seen_is_left_empty():
    assert kernel_times.compare(row(1e-6), [])["ratio"] is None


@pytest.mark.parametrize("name", ["tiny", "tiny_padded"])
def test_a_pass_launches_every_kernel_of_the_report(name, device, monkeypatch):
    """The interpreter has no launches to time, so the names come from the plans' launches."""
    launched = []

    def launch_seconds(run, device, repeats):
        run()
        return {launch: repeats * [1e-6] for launch in launched}

    plan_pass = kernel_times.plan_pass

    def noted(attention):
        plans = plan_pass(attention)
        launched.extend(launch.name for plan in plans for launch in plan.launches)
        return plans

    monkeypatch.setattr(kernel_times, "plan_pass", noted)
    monkeypatch.setattr(kernel_times.measure, "launch_seconds", launch_seconds)
    monkeypatch.setattr(kernel_times.tiles, "architecture_of", lambda device: "sm_90")
    with kernel_times.forms.use_form("routed"):
        times = kernel_times.times_of(PROBLEMS[name], torch.float32, device)
    assert set(times) >= {"region_means", "route", "attention_forward", "key_value_gradient"}
    assert all(len(each) == kernel_times.REPEATS for each in times.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        kernel_times.main([])
    assert "`bra-bench report` predicts without one" in capsys.readouterr().err
