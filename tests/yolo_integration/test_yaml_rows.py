"""Yaml rows of the blocks: the modules that they build."""

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml as pyyaml
from rows import build, refusal
from torch import nn
from ultralytics.nn import modules, tasks

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.yolo_integration import (
    C2BRA,
    BiFormerBlock,
    C3k2BRA,
    NCHWBiLevelRoutingAttention2d,
)


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


def gradients(yaml: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Gradients of every parameter, by name, after one training step of a detection model."""
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
    return {name: value.grad for name, value in model.named_parameters()}


def test_model_with_an_nchw_row_trains() -> None:
    """The model finds its strides at 256 pixels; at 64 its last map is smaller than n_win."""
    yaml = tasks.yaml_model_load("yolo26n-bra.yaml")
    yaml["backbone"][-1] = [-1, 1, "nchwBRA", [{"topk": 2}]]
    of_the_row = [value for name, value in gradients(yaml).items() if name.startswith("model.11.")]
    assert len(of_the_row) == 6
    assert all(value.isfinite().all() for value in of_the_row)


def test_model_with_c3k2bra_in_its_neck_trains() -> None:
    yaml = tasks.yaml_model_load("yolo26n-bra.yaml")
    numbers = [11 + 1 + at for at, row in enumerate(yaml["head"]) if row[2] == "C3k2"]
    yaml["head"] = [[*row[:2], "C3k2BRA", row[3][:1]] if row[2] == "C3k2" else row for row in yaml["head"]]
    found = gradients(yaml)
    assert numbers == [14, 17, 20, 23]
    for number in numbers:
        of_the_row = [value for name, value in found.items() if name.startswith(f"model.{number}.")]
        assert len(of_the_row) == 24
        assert all(value.isfinite().all() and value.abs().max() > 0 for value in of_the_row)


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


def test_blocks_leave_the_stock_classes_as_they_are() -> None:
    stock = {name: getattr(modules, name) for name in ("C3TR", "C3x", "C3Ghost", "C2PSA", "C2fCIB")}
    model = build([-1, 1, "C3TR", [64]], [-1, 1, "C3x", [64]], [-1, 1, "C2BRA", [64]])
    assert [type(row) for row in model[1:4]] == [stock["C3TR"], stock["C3x"], C2BRA]
    with pytest.raises(ValueError, match="topk must be at most"):
        build([-1, 1, "C3k2BRA", [64]], [-1, 1, "C2BRA", [64, {"topk": 100}]])
    assert {name: getattr(tasks, name) for name in stock} == stock


@pytest.mark.parametrize("kept", [(), ("C3k2",), ("C2fCIB",)])
def test_models_with_c3k2bra_get_the_head_that_c3k2_gives_them(kept: tuple[str, ...]) -> None:
    rows = [[-1, 1, name, [64]] for name in (*kept, "C3k2BRA", "C2BRA")]
    yaml = {"nc": 1, "backbone": [[-1, 1, "Conv", [64, 3, 2]], *rows], "head": [[[-1], 1, "Detect", [1]]]}
    model = tasks.parse_model(copy.deepcopy(yaml), ch=3, verbose=False)[0]
    assert [type(row).__name__ for row in model[1:-1]] == [*kept, "C3k2BRA", "C2BRA"]
    assert model[-1].legacy is False
    del yaml["backbone"][1:]
    assert tasks.parse_model(yaml, ch=3, verbose=False)[0][-1].legacy is True


def test_c3k2bra_scales_its_width_as_c3k2_does_in_every_scale() -> None:
    for scale in "nm":  # in scale m, parse_model overwrites C3k2's first argument
        scales = {"scales": {scale: [1.0, 0.25, 512]}, "scale": scale}
        model = build([-1, 2, "C3k2BRA", [1024, {"topk": 2}]], [-1, 1, "BiFormerBlock", []], **scales)
        assert type(model[1]) is C3k2BRA
        assert [block[1].attn.attn.spec.topk for block in model[1].m] == [2, 2]
        assert model[1].cv2.conv.out_channels == 128  # min(1024, 512) * 0.25
        assert model[2].attn.spec.dim == 128


POSITIONAL = {
    "BiLevelRoutingAttention": BiLevelRoutingAttention,
    "NCHWBiLevelRoutingAttention": NCHWBiLevelRoutingAttention,
    "nchwBRA": NCHWBiLevelRoutingAttention,
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_positions_follow_the_signature_of_the_class(name: str) -> None:
    values = {"num_heads": 4, "n_win": 5, "qk_scale": 0.5, "topk": 3, "side_dwconv": 5}
    parameters = [*inspect.signature(POSITIONAL[name]).parameters.values()][1:]
    positions = [values.get(p.name, p.default) for p in parameters if p.kind != p.KEYWORD_ONLY]
    attention = build([-1, 1, name, positions])[1].attn
    assert attention.spec == POSITIONAL[name](64, **values).spec
    assert attention.lepe.kernel_size == (5, 5)
    assert attention.auto_pad is False
    short = build([-1, 1, name, [8, 7]])[1].attn.spec
    assert (short.num_heads, short.n_win, short.topk) == (8, 7, 4)


NAMED = [
    [{"topk": 8, "n_win": 5, "num_heads": 4}],
    [{"topk": 8}, {"n_win": 5}, {"num_heads": 4}],  # what yaml makes of [topk: 8, n_win: 5, num_heads: 4]
    [{"topk": "8", "n_win": np.int64(5), "num_heads": 4}],
]
PARTLY_POSITIONAL = [[4, 5, {"topk": 8}], [4, {"n_win": 5, "topk": 8}], ["4", 5, {"topk": 8}]]
ARGUMENTS_OF_ROWS = [
    *((name, arguments) for name in ("BiFormerBlock", "C2BRA", "C3k2BRA") for arguments in NAMED),
    *((name, arguments) for name in POSITIONAL for arguments in (*NAMED, *PARTLY_POSITIONAL)),
]


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS_OF_ROWS)
def test_arguments_override(name: str, arguments: list) -> None:
    model = build([-1, 1, name, [64, *arguments] if name in ("C2BRA", "C3k2BRA") else arguments])
    kinds = (BiLevelRoutingAttention, NCHWBiLevelRoutingAttention)
    (attention,) = (module for module in model.modules() if isinstance(module, kinds))
    assert (attention.spec.topk, attention.spec.n_win, attention.spec.num_heads) == (8, 5, 4)


@pytest.mark.parametrize("arguments", [None, "None", [], {}, [{}], [None], ["None"]])
def test_no_arguments_may_be_written_in_any_way(arguments: Any) -> None:
    spec = build([-1, 1, "BiLevelRoutingAttention", arguments])[1].attn.spec
    assert (spec.num_heads, spec.n_win, spec.topk) == (2, 5, 4)


def test_names_need_no_list() -> None:
    model = build([-1, 1, "nchwBRA", {"topk": 2}], [-1, 1, "BiFormerBlock", {"topk": 2, "mlp_ratio": 2}])
    assert [row.attn.spec.topk for row in model[1:3]] == [2, 2]
    assert model[2].mlp[0].out_features == 2 * 64


def test_every_argument_can_be_named() -> None:
    arguments = {"qk_dim": 32, "side_dwconv": 0, "auto_pad": False, "backend": "reference", "mlp_ratio": 2}
    block = build([-1, 1, "BiFormerBlock", [{**arguments, "qk_scale": "None"}]])[1]
    assert block.attn.spec.qk_dim == 32
    assert block.attn.lepe is None
    assert block.attn.auto_pad is False
    assert block.attn.backend == "reference"
    assert block.mlp[0].out_features == 2 * 64
    assert build([-1, 1, "C2BRA", [64, {"e": 0.25}]])[1].c == 16


def test_any_number_can_be_named_and_32_heads_and_64_regions_a_side_given_by_position() -> None:
    model = build(
        [-1, 1, "nchwBRA", [{"num_heads": 64, "n_win": 65}]],
        [-1, 1, "BiLevelRoutingAttention", [32, 64]],
        [-1, 1, "BiLevelRoutingAttention", [8, [4, 80]]],
    )
    assert [row.attn.spec.num_heads for row in model[1:4]] == [64, 32, 8]
    assert [row.attn.spec.n_win for row in model[1:4]] == [65, 64, (4, 80)]


def test_a_module_of_the_users_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "C2f_BiFormer", nn.Identity, raising=False)
    assert type(build([-1, 1, "C2f_BiFormer", []])[1]) is nn.Identity


def test_a_row_may_give_the_whole_name() -> None:
    model = build(*([-1, 1, f"bra_triton.yolo_integration.{name}", [64]] for name in ("C2BRA", "C3k2BRA")))
    assert [type(row) for row in model[1:3]] == [C2BRA, C3k2BRA]


def test_rows_of_the_migration_page_build() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    rows = re.findall(r"^\| `(\[.*?\])` \| `(\[.*?\])` \|", page, re.MULTILINE)
    assert len(rows) > 15
    for elsewhere, here in rows:
        build(pyyaml.safe_load(here))
        row = pyyaml.safe_load(elsewhere)
        if row[3] and elsewhere != here and not hasattr(modules, row[2]):
            refusal(row)


def test_rows_given_are_not_changed() -> None:
    row = [-1, 1, "C2BRA", [64, {"topk": 2}]]
    build(row)
    assert row == [-1, 1, "C2BRA", [64, {"topk": 2}]]
