"""The main job end to end, on tiny pictures and for two steps: its checks, its files, its report."""

import json
import os
import tempfile

import pytest

# Read by Ultralytics when it is imported.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="bra_triton_ultralytics_"))
os.environ["YOLO_OFFLINE"] = "true"

from bra_triton.bench import demo

ARGUMENTS = ["--epochs", "1", "--imgsz", "32", "--compare-steps", "2"]


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a model would take minutes


def test_demo_writes_pictures_and_the_figures_that_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        demo,
        "attention_costs",
        lambda options: {"map": {b: {"seconds": 1, "peak_bytes": 1} for b in demo.BACKENDS}},
    )
    assert demo.main([*ARGUMENTS, "--out", str(tmp_path), "--required-map50", "0"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(list((tmp_path / "predictions").glob("*.jpg"))) == 8
    assert [len(run["loss"]) for run in summary["steps"].values()] == [2, 2, 2]
    # Float32's 6e-8, amplified by one step of training.
    assert max(summary["loss_distance"]["auto"]) < 1e-5
    printed = capsys.readouterr().out
    assert all(f"{loss:.6f}" in printed for loss in summary["steps"]["auto"]["loss"])


@pytest.mark.parametrize(
    ("map50", "difference", "message"),
    [
        (0.2, 1e-7, "FAILED: mAP50 0.200 is under 0.5"),
        (0.7, 1e-4, "FAILED: in step 0 the backends' losses differ by 1.0e-04"),
        (0.7, float("nan"), "FAILED: in step 0 the backends' losses differ by nan"),
        (float("nan"), 1e-7, "FAILED: mAP50 nan is under 0.5"),
    ],
)
def test_demo_fails_where_the_model_did_not_learn_or_the_backends_differ(
    map50, difference, message, tmp_path, capsys, monkeypatch
):
    # The second step's control is far off and must not excuse the first.
    losses = {"auto": [1 + difference, 1.0], "reference": [1.0, 1.0], demo.CONTROL: [1 + 1e-6, 1.1]}
    training = {"seconds": 1, "steps": 1, "mAP50": map50, "mAP50-95": 0.1}
    monkeypatch.setattr(demo, "train", lambda data, options: training)
    monkeypatch.setattr(
        demo, "compare_steps", lambda data, name, options: {"loss": losses[name], "seconds": [1, 1]}
    )
    monkeypatch.setattr(demo, "attention_costs", lambda options: {})
    assert demo.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


def test_attention_costs_are_taken_from_the_attention_layers_alone():
    costs = demo._attention_cost("yolo26n-bra.yaml", 1, 64)
    assert set(costs) == set(demo.BACKENDS)
    assert all(value > 0 for figures in costs.values() for value in figures.values())
