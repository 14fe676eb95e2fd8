"""What Ultralytics does: frozen rows, changing sizes, averages, resuming, tuning, benchmark, tracking."""

import csv
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml as pyyaml
from ultralytics import YOLO

import bra_triton.yolo_integration  # noqa: F401

KILLED_IN_THE_SECOND_EPOCH = """
import os, signal
from ultralytics import YOLO
import bra_triton.yolo_integration

model = YOLO("yolo26n-bra.yaml", verbose=False)
model.add_callback("on_train_batch_start", lambda t: t.epoch == 1 and os.kill(os.getpid(), signal.SIGKILL))
model.train(**{arguments!r}, epochs=2, project={project!r}, name="killed")
"""


@pytest.mark.usefixtures("short_training")
def test_frozen_rows_stay_others_learn_on_all_sizes_and_the_average_follows(
    train_arguments: dict, tmp_path: Path
) -> None:
    """Rows 10 and 11 hold the attention; with `rect` and `multi_scale` maps are not square and change size.

    Only weights are compared: biases get no gradient here, because a BatchNorm follows.
    """
    model = YOLO("yolo26n-bra.yaml", verbose=False)
    before: dict[str, torch.Tensor] = {}
    sizes = set()

    def start(trainer: Any) -> None:
        before.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
        trainer.model.model[11].register_forward_pre_hook(lambda _, inputs: sizes.add(inputs[0].shape[2:]))

    model.add_callback("on_train_start", start)
    # 64 to 192 pixels. Without `nbs=1` the optimizer would take one step for the gradients of 64 images.
    sizes_change = {"rect": True, "multi_scale": 0.5, "imgsz": 128, "batch": 1, "nbs": 1}
    model.train(
        **train_arguments | sizes_change, freeze=[10], epochs=1, warmup_epochs=0, project=str(tmp_path)
    )
    after, average = model.trainer.model.state_dict(), model.trainer.ema.ema.state_dict()
    frozen, learning = (
        [name for name in after if name.startswith(f"model.{row}.") and name.endswith("weight")]
        for row in (10, 11)
    )
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert len(sizes) > 2, sizes
    for name in learning:
        learnt, averaged = after[name] - before[name], average[name] - before[name]
        assert 0 < averaged.norm() < learnt.norm(), name


@pytest.mark.usefixtures("short_training")
def test_a_killed_training_resumes_and_ends_after_the_epochs_that_were_asked_for(
    fresh_python, train_arguments: dict, tmp_path: Path
) -> None:
    script = KILLED_IN_THE_SECOND_EPOCH.format(arguments=train_arguments, project=str(tmp_path))
    assert fresh_python("-c", script, check=False).returncode == -signal.SIGKILL
    folder = tmp_path / "killed"
    model = YOLO(folder / "weights" / "last.pt")
    model.train(resume=True)
    assert model.trainer.start_epoch == 1
    with (folder / "results.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.usefixtures("short_training")
def test_hyperparameters_are_tuned(trained: Path, train_arguments: dict, tmp_path: Path) -> None:
    model = YOLO(trained / "best.pt")
    model.tune(**train_arguments, epochs=1, iterations=1, val=False, project=str(tmp_path), name="tune")
    assert (tmp_path / "tune" / "best_hyperparameters.yaml").is_file()


def test_the_benchmark_exports_and_validates(
    trained: Path, data_yaml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark catches errors, and reports them only in its table."""
    monkeypatch.chdir(tmp_path)  # the benchmark writes a log here
    weights = shutil.copy(trained / "best.pt", tmp_path)  # the export is written beside the weights
    (row,) = YOLO(weights).benchmark(data=data_yaml, imgsz=64, format="onnx").rows()
    assert {"ONNX", "✅"} <= set(row), row


def test_objects_are_tracked(trained: Path, tmp_path: Path) -> None:
    """This detector's confidences are near 0, so the tracker's thresholds are, too."""
    thresholds = {"track_high_thresh": 1e-4, "track_low_thresh": 1e-5, "new_track_thresh": 1e-4}
    others = {"tracker_type": "bytetrack", "track_buffer": 30, "match_thresh": 0.8, "fuse_score": False}
    tracker = tmp_path / "tracker.yaml"
    tracker.write_text(pyyaml.safe_dump(thresholds | others))
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    arguments = {"imgsz": 96, "conf": 1e-4, "max_det": 5, "verbose": False}
    model = YOLO(trained / "best.pt")
    frames = [model.track(image, tracker=str(tracker), persist=True, **arguments)[0] for _ in range(3)]
    assert frames[0].boxes.id is not None
    assert all(set(frame.boxes.id.tolist()) == set(frames[0].boxes.id.tolist()) for frame in frames)
