"""Which labelled objects the demo counts as found, `bra-yolo demo`, and `data=photos.yaml`."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from ultralytics.data.utils import check_det_dataset

from bra_triton.yolo_integration import command_line, demo, registration
from bra_triton.yolo_integration.demo import missed_objects
from bra_triton.yolo_integration.photo_dataset import load_photos

LABELS = [("person", 0, 0, 10, 10), ("person", 2, 0, 12, 10), ("cat", 50, 50, 60, 60)]
PHOTO = dataclasses.replace(load_photos()[1][0], boxes=LABELS)


def result(*predictions):
    names = {0: "person", 1: "cat"}
    kinds = [{"person": 0, "cat": 1}[name] for name, *_ in predictions]
    boxes = torch.tensor([box for _, *box in predictions], dtype=torch.float32).view(-1, 4)
    return SimpleNamespace(names=names, boxes=SimpleNamespace(cls=torch.tensor(kinds), xyxy=boxes))


@pytest.mark.parametrize(
    ("predictions", "missed"),
    [
        (LABELS, []),
        ([], ["person", "person", "cat"]),
        (LABELS[1:], ["person"]),  # one prediction overlaps both persons by half, and counts for one
        # The first person takes the second prediction, which overlaps it most, and leaves the other one.
        ([LABELS[1], ("person", -1.5, 0, 8.5, 10), LABELS[2]], []),
        ([*LABELS[:2], ("person", 50, 50, 60, 60)], ["cat"]),  # of another class
        ([*LABELS[:2], ("cat", 50, 50, 60, 54)], ["cat"]),  # overlaps by two fifths
    ],
)
def test_an_object_is_found_by_a_prediction_of_its_class_that_overlaps_by_half(predictions, missed):
    assert missed_objects(PHOTO, result(*predictions)) == missed


def test_the_command_runs_the_demo(tmp_path, monkeypatch, capsys):
    learned = {"seconds": 9, "steps": 1, "mAP50": 0.96, "mAP50-95": 0.8, "objects": 23, "missed": []}
    monkeypatch.setattr(demo, "learn", lambda options: learned)
    monkeypatch.setattr(sys, "argv", ["bra-yolo", "demo", "--out", str(tmp_path / "demo")])
    assert command_line.main() == 0
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == learned
    printed = capsys.readouterr().out
    assert "minutes of CPU time" in printed
    assert "objects found  23 of 23 (none missed)" in printed
    learned["missed"] = ["cat in chelsea.png"]
    assert command_line.main() == 1
    printed = capsys.readouterr().out
    assert "objects found  22 of 23 (cat in chelsea.png missed)" in printed
    assert "FAILED: not found: cat in chelsea.png" in printed


def test_photos_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(registration, "DATASETS_DIR", tmp_path)
    for name in ("photos.yaml", "photos"):
        data = check_det_dataset(name, autodownload=False)
        assert data["train"] == str(tmp_path / "photos" / "images")
        assert len(data["names"]) == 11
    # A file of that name in the working directory is the user's own.
    (tmp_path / "photos.yaml").write_text("train: photos/images\nval: photos/images\nnames: [all]\n")
    monkeypatch.chdir(tmp_path)
    assert check_det_dataset("photos.yaml", autodownload=False)["names"] == {0: "all"}
