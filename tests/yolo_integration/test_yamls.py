"""The packaged yamls."""

import re
from pathlib import Path

import pytest
import torch
import ultralytics
from tiny_data import write_data
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils import YAML
from ultralytics.utils.torch_utils import get_flops

from bra_triton.yolo_integration import (
    C2BRA,
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    registration,
)

STEMS = ("bra", "biformer")
STOCK_YAMLS = Path(ultralytics.__file__).parent / "cfg" / "models" / "26"
TASKS = {
    "": "detect",
    "-cls": "classify",
    "-depth": "depth",
    "-obb": "obb",
    "-pose": "pose",
    "-seg": "segment",
    "-sem": "semantic",
}


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


def test_there_is_a_yaml_for_every_task_that_ultralytics_has() -> None:
    assert set(TASKS.values()) == set(ultralytics.cfg.TASKS)
    stems = {file.stem for file in registration.PACKAGED_YAMLS.glob("*.yaml")}
    assert stems == {
        *("yolo26-biformer", "yolo26-biformer-seg"),
        *(f"yolo26-bra{suffix}" for suffix in TASKS),
    }


def test_the_biformer_that_segments_is_the_detector_with_the_stock_head() -> None:
    folder = registration.PACKAGED_YAMLS
    ours, detector = (YAML.load(folder / f"yolo26-biformer{suffix}.yaml") for suffix in ("-seg", ""))
    stock = YAML.load(STOCK_YAMLS / "yolo26-seg.yaml")
    *rows, (_, *last) = ours["head"]
    assert last == stock["head"][-1][1:]
    assert {**ours, "head": [*rows, detector["head"][-1]]} == detector


@pytest.mark.parametrize("suffix", TASKS)
def test_bra_yaml_is_the_stock_one_apart_from_the_last_two_rows_of_its_backbone(suffix: str) -> None:
    stock = YAML.load(STOCK_YAMLS / f"yolo26{suffix}.yaml")
    ours = YAML.load(registration.PACKAGED_YAMLS / f"yolo26-bra{suffix}.yaml")
    *rows, replaced = stock.pop("backbone")
    assert replaced[2] == "C2PSA"
    *kept, stage, attention = ours.pop("backbone")
    assert kept == rows
    arguments = [{"topk": 16, "n_win": 7}] if suffix == "-cls" else []  # the reason is in the file
    assert stage == [-1, 2, "bra_triton.yolo_integration.C2BRA", [1024, *arguments]]
    assert attention == [-1, 1, "bra_triton.yolo_integration.BiLevelRoutingAttention", arguments]

    def moved(row: int) -> int:  # the row added to the backbone moves all rows from C2PSA on
        return row + 1 if row >= len(rows) else row

    assert ours.pop("head") == [
        [[moved(i) for i in source] if isinstance(source, list) else moved(source), *row]
        for source, *row in stock.pop("head")
    ]
    assert ours == stock  # nc, scales, kpt_shape, ...


def first_tensor(outputs: object) -> torch.Tensor:
    while not isinstance(outputs, torch.Tensor):
        outputs = outputs[0]  # type: ignore[index]
    return outputs


@pytest.mark.usefixtures("short_training")
@pytest.mark.parametrize(
    ("stem", "task"),
    [
        *((f"bra{suffix}", task) for suffix, task in TASKS.items() if suffix),  # `trained` covers detection
        ("biformer-seg", "segment"),
    ],
)
def test_every_task_trains_and_is_exported(
    stem: str, task: str, tmp_path: Path, train_arguments: dict
) -> None:
    data = write_data(tmp_path / "data", task, images=2)
    model = YOLO(f"yolo26n-{stem}.yaml")
    assert model.task == task
    model.train(**{**train_arguments, "data": data}, epochs=1, project=str(tmp_path), name="train")
    exported = torch.jit.load(model.export(format="torchscript", imgsz=64))
    x = torch.rand(1, 3, 64, 64)
    # Heads of semantic maps and depths enlarge their maps only for an export.
    model.model.model[-1].export = True
    with torch.no_grad():
        actual, expected = first_tensor(exported(x)), first_tensor(model.model.eval()(x))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_the_licence_of_the_yamls_lies_beside_them() -> None:
    assert "GNU AFFERO GENERAL PUBLIC LICENSE" in (registration.PACKAGED_YAMLS / "LICENSE").read_text()


def test_a_users_own_yaml_of_the_same_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yolo26-bra.yaml").write_text("nc: 7\n")
    monkeypatch.chdir(tmp_path)
    assert tasks.yaml_model_load("yolo26s-bra.yaml")["nc"] == 7


def test_an_unknown_yaml_is_still_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="nonesuch"):
        tasks.yaml_model_load("yolo26n-nonesuch.yaml")
