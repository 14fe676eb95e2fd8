"""The packaged yamls."""

import re
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils.torch_utils import get_flops

from bra_triton.yolo_integration import (
    C2BRA,
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    registration,
)

STEMS = ("bra", "biformer")


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("stem", STEMS)
def test_packaged_yaml_builds_by_name_in_every_scale_with_the_parameters_it_states(
    stem: str, scale: str
) -> None:
    with torch.device("meta"):
        model, _ = tasks.parse_model(tasks.yaml_model_load(f"yolo26{scale}-{stem}.yaml"), ch=3, verbose=False)
    text = (registration.PACKAGED_YAMLS / f"yolo26-{stem}.yaml").read_text()
    stated = re.search(rf"^  {scale}: .*# ([\d,]+) parameters", text, re.MULTILINE)
    assert stated is not None
    assert f"{sum(value.numel() for value in model.parameters()):,}" == stated[1]


@pytest.mark.parametrize("stem", STEMS)
def test_model_by_name_predicts_reports_and_fuses(stem: str) -> None:
    model = YOLO(f"yolo26n-{stem}.yaml")
    text = (registration.PACKAGED_YAMLS / f"yolo26-{stem}.yaml").read_text()
    stated = re.search(r"^  n: .* parameters, ([\d.]+) GFLOPs", text, re.MULTILINE)
    assert stated is not None
    assert f"{get_flops(model.model):.1f}" == stated[1]
    assert model.info()[0] > 200
    net = model.model.eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        before = net(x)[0]
        after = net.fuse(verbose=False, imgsz=64)(x)[0]
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_packaged_yamls_hold_the_blocks_they_are_named_after() -> None:
    with torch.device("meta"):
        bra, biformer = (
            tasks.parse_model(tasks.yaml_model_load(f"yolo26l-{stem}.yaml"), ch=3, verbose=False)[0]
            for stem in STEMS
        )
    assert type(bra[10]) is C2BRA
    assert len(bra[10].m) == 2
    assert type(bra[11]) is BiLevelRoutingAttention2d
    stages = [
        [module for module in biformer[i].modules() if type(module) is BiFormerBlock] for i in (2, 4, 6, 8)
    ]
    assert [len(stage) for stage in stages] == [2, 2, 4, 2]
    specs = [stage[0].attn.spec for stage in stages]
    assert [spec.topk for spec in specs] == [1, 4, 16, 16]
    assert specs[-1].topk == specs[-1].n_win ** 2


def test_a_users_own_yaml_of_the_same_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yolo26-bra.yaml").write_text("nc: 7\n")
    monkeypatch.chdir(tmp_path)
    assert tasks.yaml_model_load("yolo26s-bra.yaml")["nc"] == 7


def test_an_unknown_yaml_is_still_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="nonesuch"):
        tasks.yaml_model_load("yolo26n-nonesuch.yaml")
