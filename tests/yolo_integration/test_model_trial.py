"""Errors in the trial of a new model: Ultralytics runs it once, on a small image, to learn its strides."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.nn import tasks

import bra_triton.yolo_integration  # noqa: F401
from bra_triton import BiLevelRoutingAttention


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_pad": False}, "the map's height and width must be multiples of n_win=5, got 8 x 8; "),
        ({"backend": "triton"}, "backend='triton' cannot serve: tensors on the CPU need "),
        (
            {"kv_downsample_mode": "avgpool"},
            "kv_downsample_ratio must be at most a region's side of 2 tokens, got 4; "
            "the map has 8 x 8 tokens and 5 x 5 regions (n_win)",
        ),
    ],
)
@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [(tasks.DetectionModel, "yolo26n-bra", 11), (tasks.SemanticSegmentationModel, "yolo26n-bra-sem", 10)],
)
def test_errors_in_ultralytics_trial_of_a_new_model_name_the_row(
    kind: type[nn.Module], name: str, number: int, arguments: dict[str, Any], message: str
) -> None:
    yaml = tasks.yaml_model_load(f"{name}.yaml")
    row = yaml["backbone"][number]
    row[3] = [*(value for value in row[3] if not isinstance(value, dict)), arguments]
    written = copy.deepcopy(row)
    with pytest.raises(ValueError, match=re.escape(f"row {number}, {written}: {message}")) as error:
        kind(yaml, verbose=False)
    assert str(error.value).endswith(" (Ultralytics tries new models on the CPU, at 256 x 256 pixels)")


def test_errors_of_other_rows_and_of_memory_stay_as_they_are_in_the_trial(monkeypatch) -> None:
    yaml = tasks.yaml_model_load("yolo26n-bra.yaml")
    yaml["head"][1][0] = [-1, 4]  # maps of two sizes
    with pytest.raises(RuntimeError, match=r"^Sizes of tensors must match"):
        tasks.DetectionModel(yaml, verbose=False)

    def run_out(*_others: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(BiLevelRoutingAttention, "forward", run_out)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        tasks.DetectionModel("yolo26n-bra.yaml", verbose=False)


def test_a_model_that_does_not_take_the_size_of_the_summary_is_built() -> None:
    yaml = tasks.yaml_model_load("yolo26n-bra.yaml")
    yaml["backbone"][11][3] = [{"n_win": 8, "auto_pad": False}]  # 8 does not divide the 20 x 20 at 640 pixels
    model = tasks.DetectionModel(yaml)
    assert type(model.model[11].attn) is BiLevelRoutingAttention
    assert not hasattr(model.model[11].attn, "total_ops")
