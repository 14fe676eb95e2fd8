"""Yaml rows of the blocks, and the packaged yamls."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import modules, tasks
from ultralytics.utils.torch_utils import get_flops

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.yolo_integration import (
    C2BRA,
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    NCHWBiLevelRoutingAttention2d,
    registration,
)

STEMS = ("bra", "biformer")


def build(*rows: list, **settings: object) -> nn.Sequential:
    """Parses rows behind one 64-channel convolution; the head is one more convolution of 32 channels."""
    yaml = {
        "nc": 1,
        "backbone": [[-1, 1, "Conv", [64, 3, 2]], *(list(row) for row in rows)],
        "head": [[-1, 1, "Conv", [32, 1]]],
        **settings,
    }
    return tasks.parse_model(yaml, ch=3, verbose=False)[0]


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


def test_rows_need_no_channel_count_whatever_they_read_from() -> None:
    model = build(
        [-1, 1, "BiLevelRoutingAttention", []],
        [-1, 1, "Conv", [128, 3, 2]],
        [1, 1, "BiFormerBlock", []],
        [-2, 1, "BiFormerBlock", []],
    )
    assert model[1].attn.spec.dim == 64
    assert model[3].attn.spec.dim == 64
    assert model[4].attn.spec.dim == 128
    assert model[5].conv.in_channels == 128
    assert all(module.auto_pad for module in model.modules() if isinstance(module, BiLevelRoutingAttention))


@pytest.mark.parametrize("name", ["nchwBRA", "NCHWBiLevelRoutingAttention"])
def test_rows_of_the_nchw_form(name: str) -> None:
    model = build([-1, 1, name, []], [-1, 1, name, [{"side_dwconv": 5, "attn_backend": "torch"}]])
    assert [type(row) for row in model[1:3]] == [NCHWBiLevelRoutingAttention2d] * 2
    assert (model[1].attn.spec.dim, model[1].attn.spec.num_heads, model[1].attn.auto_pad) == (64, 2, True)
    assert model[2].attn.lepe.kernel_size == (5, 5)
    assert model[2].attn.backend == "torch"
    assert model[3].conv.in_channels == 64


def test_model_with_an_nchw_row_trains() -> None:
    """The model finds its strides at 256 pixels; at 64 its last map is smaller than n_win."""
    yaml = tasks.yaml_model_load("yolo26n-bra.yaml")
    yaml["backbone"][-1] = [-1, 1, "nchwBRA", [2]]
    model = tasks.DetectionModel(yaml, nc=1, verbose=False)
    x = torch.rand(2, 3, 64, 96)
    batch = {
        "img": x,
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.zeros(2, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2),
    }
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=1, overlap_mask=True)
    loss, _ = model.train().loss(batch)
    loss.sum().backward()
    (attention,) = (m for m in model.modules() if isinstance(m, NCHWBiLevelRoutingAttention))
    assert all(value.grad.isfinite().all() for value in attention.parameters())


def test_a_block_may_be_the_first_row() -> None:
    yaml = {"backbone": [[-1, 1, "BiLevelRoutingAttention", []]], "head": [[-1, 1, "Conv", [8, 1]]]}
    assert tasks.parse_model(yaml, ch=3, verbose=False)[0][0].attn.spec.dim == 3


def test_repeats_of_blocks_scale_with_depth() -> None:
    rows = [-1, 4, "BiFormerBlock", []], [-1, 4, "C2BRA", [64]]
    model = build(*rows, depth_multiple=0.5)
    assert [type(block) for block in model[1]] == [BiFormerBlock] * 2
    assert len(model[2].m) == 2


def test_c2bra_scales_its_width_as_c2psa_does_and_the_next_row_knows() -> None:
    scales = {"scales": {"n": [1.0, 0.25, 512]}, "scale": "n"}
    model = build([-1, 1, "C2BRA", [1024]], [-1, 1, "BiFormerBlock", []], **scales)
    assert model[1].cv1.conv.in_channels == 16
    assert model[1].cv2.conv.out_channels == 128  # min(1024, 512) * 0.25
    assert model[2].attn.spec.dim == 128
    assert model[3].conv.in_channels == 128


def test_c2bra_leaves_the_stock_classes_as_they_are() -> None:
    stock = {name: getattr(modules, name) for name in ("C3TR", "C3x", "C3Ghost", "C2PSA")}
    model = build([-1, 1, "C3TR", [64]], [-1, 1, "C3x", [64]], [-1, 1, "C2BRA", [64]])
    assert [type(row) for row in model[1:4]] == [stock["C3TR"], stock["C3x"], C2BRA]
    with pytest.raises(ValueError, match="topk"):
        build([-1, 1, "C2BRA", [64, 100]])
    assert {name: getattr(tasks, name) for name in stock} == stock


@pytest.mark.parametrize(
    "trailing",
    [
        [8, 5, 4],
        [{"topk": 8, "n_win": 5, "num_heads": 4}],
        [{"topk": 8}, {"n_win": 5}, {"num_heads": 4}],  # what yaml makes of [topk: 8, n_win: 5, num_heads: 4]
        [8, 5, {"num_heads": 4}],
        [8, 5, "4"],
    ],
)
@pytest.mark.parametrize("name", ["BiLevelRoutingAttention", "nchwBRA", "BiFormerBlock", "C2BRA"])
def test_trailing_arguments_override(name: str, trailing: list) -> None:
    model = build([-1, 1, name, [64, *trailing] if name == "C2BRA" else trailing])
    kinds = (BiLevelRoutingAttention, NCHWBiLevelRoutingAttention)
    (attention,) = (module for module in model.modules() if isinstance(module, kinds))
    assert (attention.spec.topk, attention.spec.n_win, attention.spec.num_heads) == (8, 5, 4)


def test_every_argument_can_be_named() -> None:
    arguments = {"qk_dim": 32, "side_dwconv": 0, "auto_pad": False, "backend": "reference", "mlp_ratio": 2}
    block = build([-1, 1, "BiFormerBlock", [{**arguments, "qk_scale": "None"}]])[1]
    assert block.attn.spec.qk_dim == 32
    assert block.attn.lepe is None
    assert block.attn.auto_pad is False
    assert block.attn.backend == "reference"
    assert block.mlp[0].out_features == 2 * 64
    assert build([-1, 1, "C2BRA", [64, {"e": 0.25}]])[1].c == 16


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [-1, 1, "BiFormerBlock", [{"topkk": 4}]],
            "BiFormerBlock: unknown argument 'topkk'; allowed .* topk, ",
        ),
        ([-1, 1, "BiLevelRoutingAttention", [{"mlp_ratio": 4}]], "unknown argument 'mlp_ratio'"),
        ([-1, 1, "nchwBRA", [{"qk_dim": 4}]], "nchwBRA: unknown argument 'qk_dim'; allowed are topk, "),
        ([-1, 1, "nchwBRA", [1] * 9], "nchwBRA: 9 positional arguments; at most 8 are allowed"),
        ([-1, 1, "nchwBRA", [{"attn_backend": "cuda"}]], "attn_backend must be one of"),
        ([-1, 1, "BiFormerBlock", [4, {"topk": 4}]], "'topk' is given twice"),
        ([-1, 1, "BiFormerBlock", [{"topk": 4}, 7]], "7 follows named"),
        ([-1, 1, "BiFormerBlock", [1] * 30], "30 positional arguments; at most"),
        ([-1, 1, "BiFormerBlock", [50]], "topk must be at most .* 49, got 50"),
        ([-1, 1, "BiFormerBlock", [0.5]], "topk must be an int"),
        ([-1, 1, "C2BRA", []], "C2BRA: the first argument must be the output channels"),
        ([[-1, 0], 1, "BiFormerBlock", []], r"`from` must be one row's number, got \[-1, 0\]"),
    ],
)
def test_wrong_rows_are_explained(row: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(row)


def test_rows_given_are_not_changed() -> None:
    row = [-1, 1, "C2BRA", [64, {"topk": 2}]]
    build(row)
    assert row == [-1, 1, "C2BRA", [64, {"topk": 2}]]
