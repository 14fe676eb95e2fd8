"""`bra-bench demo` end to end, on tiny pictures and for two steps: its checks, its files, its report."""

import json
import os

import pytest

from bra_triton.bench import demo
from bra_triton.yolo_integration import demo as yolo_demo

ARGUMENTS = ["--epochs", "1", "--imgsz", "32", "--compare-steps", "2"]
LEARNED = {"seconds": 1, "steps": 1, "mAP50": 0.99, "mAP50-95": 0.1, "objects": 2, "missed": []}


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # interpreted, a model takes minutes


def test_demo_writes_pictures_and_the_figures_that_it_prints(tmp_path, capsys, monkeypatch):
    # Draw one photograph only: each takes a second, and all are drawn alike. Use one thread only: tests run
    # in parallel, so a second thread would wait for a free core.
    draw = yolo_demo.draw_attention
    monkeypatch.setattr(
        yolo_demo, "draw_attention", lambda model, images, options: draw(model, images[:1], options)
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    # After one training step the model finds no object, which is the only failure.
    assert demo.main([*ARGUMENTS, "--out", str(tmp_path), "--required-map50", "0"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(list((tmp_path / "predictions").glob("*.jpg"))) == 8
    assert {file.name for file in (tmp_path / "attention").iterdir()} == {"bus.png", "pointer.html"}
    assert summary["training"]["objects"] == len(summary["training"]["missed"]) == 23
    assert [*map(len, summary["losses"].values())] == [2, 2, 2]
    # Rounding of float32, 6e-8, amplified by one training step.
    assert max(summary["loss_distance"]["auto"]) < 1e-5
    printed = capsys.readouterr().out
    assert all(f"{loss:.6f}" in printed for loss in summary["losses"]["auto"])
    failures = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 1
    assert "FAILED: not found: bus in bus.jpg, person in bus.jpg" in failures[0]
    # The first screen (24 lines) says that the model is judged on the pictures that it was trained on.
    assert "trained and judged on the\nsame pictures" in "\n".join(printed.splitlines()[:24])
    assert "objects found  0 of 23" in printed


@pytest.mark.parametrize(
    ("map50", "difference", "message"),
    [
        (0.9, 1e-7, "FAILED: mAP50 0.900 is under 0.95"),
        (0.99, 1e-4, "FAILED: in step 0 the backends' losses differ by 1.0e-04"),
        (0.99, float("nan"), "FAILED: in step 0 the backends' losses differ by nan"),
        (float("nan"), 1e-7, "FAILED: mAP50 nan is under 0.95"),
    ],
)
def test_demo_fails_where_the_model_did_not_learn_or_the_backends_differ(
    map50, difference, message, tmp_path, capsys, monkeypatch
):
    # The control's large distance in the second step must not raise the limit of the first step.
    losses = {"auto": [1 + difference, 1.0], "reference": [1.0, 1.0], demo.CONTROL: [1 + 1e-6, 1.1]}
    monkeypatch.setattr(yolo_demo, "learn", lambda options: {**LEARNED, "mAP50": map50})
    monkeypatch.setattr(demo, "compare_steps", lambda data, name, options: losses[name])
    assert demo.main([*ARGUMENTS, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out
