"""`bra-bench models`: whole models are compared, timed, and held to the target."""

import copy
import json
import re

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

from bra_triton import BiLevelRoutingAttention
from bra_triton.bench import models

FIGURES = {f"{figure} {unit}" for figure in (models.INFERENCE, models.STEP) for unit in ("ms", "MiB")}


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # interpreted, a model takes minutes


@pytest.mark.parametrize("name", ["yolo26n-bra", "biformer_tiny"])
def test_models_are_measured(name, tmp_path, capsys):
    file = tmp_path / "models.json"
    sizes = ["--imgsz", "32", "--batch", "2", "--repeats", "1"]
    status = models.main(["--model", name, *sizes, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    expected = {models.FUSED, models.REFERENCE} | ({models.STOCK} if name.startswith("yolo") else set())
    assert rows[name].keys() == expected
    assert all(row.keys() == FIGURES and min(row.values()) > 0 for row in rows[name].values())
    printed = capsys.readouterr().out
    assert all(re.search(rf"^\| {name} \| {key} +\| ", printed, re.MULTILINE) for key in expected)
    assert status == int("MISSED" in printed)


class Classifier(nn.Sequential):
    """Stands in for a whole model, which takes minutes in bfloat16 on a CPU without bfloat16 products."""

    was_autocast = False

    def forward(self, x):
        Classifier.was_autocast = torch.is_autocast_enabled("cpu")
        return super().forward(x.permute(0, 2, 3, 1)).mean((1, 2))


def _classifiers(name):
    fused = Classifier(nn.Linear(3, 8), BiLevelRoutingAttention(8, 1, 2, topk=2))
    return {models.FUSED: fused, models.REFERENCE: copy.deepcopy(fused)}


SMALL = ["--model", "biformer_tiny", "--imgsz", "32", "--repeats", "1"]


@pytest.mark.parametrize("extra", [[], ["--amp"]], ids=["float32", "autocast"])
def test_autocast_is_what_the_models_run_under(extra, monkeypatch):
    monkeypatch.setattr(models, "_models", _classifiers)
    models.main([*SMALL, *extra])
    assert Classifier.was_autocast == bool(extra)


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    def spoiled(name):
        built = _classifiers(name)
        with torch.no_grad():
            built[models.REFERENCE][0].weight.mul_(2)
        return built

    monkeypatch.setattr(models, "_models", spoiled)
    with pytest.raises(RuntimeError, match="off by"):
        models.main(SMALL)


def test_a_slower_and_a_larger_model_miss_the_target():
    good = dict.fromkeys(FIGURES, 2.0)
    rows = {
        "slow": {
            models.REFERENCE: good,
            models.FUSED: good | {"training step ms": 3.0, "training step MiB": 1.0},
        },
        "equal": {models.REFERENCE: good, models.FUSED: good},
        "large": {
            models.REFERENCE: good,
            models.FUSED: good | {"inference ms": 1.0, "inference MiB": 3.0},
        },
    }
    assert models.missed(rows) == [
        "slow: training step ms: reference / fused is 0.67, must be at least 1",
        "large: inference MiB: reference / fused is 0.67, must be at least 1",
    ]


@pytest.mark.parametrize(
    "arguments", [["--imgsz", "33"], ["--batch", "0"], ["--repeats", "0"], ["--model", "x"]]
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        models.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err
