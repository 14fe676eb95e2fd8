"""Yaml rows of the blocks: the modules that they build, and the errors for wrong rows."""

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
from torch import nn
from ultralytics.nn import modules, tasks

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.yolo_integration import (
    C2BRA,
    BiFormerBlock,
    C3k2BRA,
    NCHWBiLevelRoutingAttention2d,
    registration,
    yaml_rows,
)


def build(*rows: list, **settings: object) -> nn.Sequential:
    """Parses rows behind one 64-channel convolution; the head is one more convolution of 32 channels."""
    yaml = {
        "nc": 1,
        "backbone": [[-1, 1, "Conv", [64, 3, 2]], *(list(row) for row in rows)],
        "head": [[-1, 1, "Conv", [32, 1]]],
        **settings,
    }
    return tasks.parse_model(yaml, ch=3, verbose=False)[0]


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


def refusal(*rows: list) -> str:
    """The error of refused rows, without its beginning, which is the last row as the user wrote it."""
    written = copy.deepcopy(list(rows[-1]))
    with pytest.raises(ValueError, match=r"^row \d+, \[") as error:
        build(*rows)
    begin = f"row {len(rows)}, {written}: "
    assert str(error.value).startswith(begin)
    return str(error.value).removeprefix(begin)


@pytest.mark.parametrize(
    ("name", "arguments", "instead"),
    [
        ("BiLevelRoutingAttention", [1024], "[]"),
        ("BiLevelRoutingAttention", [512, 8], "[8]"),
        ("BiLevelRoutingAttention", [256, 256], "[]"),
        ("BiLevelRoutingAttention", [1024, 8, 7], "[8, 7]"),
        ("BiLevelRoutingAttention", ["c1", "c2"], "[]"),
        ("BiLevelRoutingAttention", ["256", {"topk": 2}], "[{'topk': 2}]"),
        ("nchwBRA", [64.0], "[]"),
        ("BiLevelRoutingAttention", [8, 256], "[8]"),
        ("nchwBRA", [8, 256, {"topk": 2}], "[8, {'topk': 2}]"),
        ("BiLevelRoutingAttention", [8, "c2", 7], "[8, 7]"),
        ("BiLevelRoutingAttention", [512, 8, 256], "[8]"),
        ("BiFormerBlock", [256, 8, {"topk": 2}], "[{'topk': 2}]"),
    ],
)
def test_channel_counts_are_refused_with_what_to_write(name: str, arguments: list, instead: str) -> None:
    message = refusal([-1, 1, name, arguments])
    assert "rows need no channel count" in message
    assert re.search(r"got \[?('c[12]'|\d+)", message)
    assert f"write {instead}" in message


def test_as_many_heads_as_channels_are_refused_by_position() -> None:
    narrow = [-1, 1, "Conv", [32, 1]]
    for row in ([-1, 1, "BiLevelRoutingAttention", [32]], [1, 1, "nchwBRA", [32, 4, {"topk": 2}]]):
        assert refusal(narrow, row).startswith("rows need no channel count, got 32; leave it out")
    assert build(narrow, [0, 1, "nchwBRA", [32]])[2].attn.spec.num_heads == 32  # of 64 channels
    assert build(narrow, [-1, 1, "nchwBRA", [{"num_heads": 32}]])[2].attn.spec.num_heads == 32


def test_any_number_can_be_named_and_32_heads_and_64_regions_a_side_given_by_position() -> None:
    model = build(
        [-1, 1, "nchwBRA", [{"num_heads": 64, "n_win": 65}]],
        [-1, 1, "BiLevelRoutingAttention", [32, 64]],
        [-1, 1, "BiLevelRoutingAttention", [8, [4, 80]]],
    )
    assert [row.attn.spec.num_heads for row in model[1:4]] == [64, 32, 8]
    assert [row.attn.spec.n_win for row in model[1:4]] == [65, 64, (4, 80)]


@pytest.mark.parametrize(
    ("name", "arguments", "instead"),
    [
        ("BiFormerBlock", [8, 7], "[]"),
        ("C2BRA", [64, 0.5], "[64, {'e': 0.5}]"),
        ("C2BRA", [64, 8, 7], "[64]"),
        ("C3k2BRA", [64, True], "[64]"),
        ("C3k2BRA", [64, False, 0.25, {"topk": 2}], "[64, {'e': 0.25}, {'topk': 2}]"),
        ("C3k2BRA", [64, None], "[64]"),
    ],
)
def test_blocks_take_names_only_and_say_what_to_write(name: str, arguments: list, instead: str) -> None:
    message = refusal([-1, 1, name, arguments])
    assert "arguments of this block go by name, got [" in message
    assert f"write {instead}" in message
    assert "channel count" not in message
    build([-1, 1, name, pyyaml.safe_load(instead)])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("BRA", "BiLevelRoutingAttention"),
        ("bra", "BiLevelRoutingAttention"),
        ("BilevelRoutingAttention", "BiLevelRoutingAttention"),
        ("bra_triton.yolo_integration.Nonesuch", "BiLevelRoutingAttention"),
        ("BiLevelRoutingAttention_nchw", "nchwBRA"),
        ("nchwbra", "nchwBRA"),
        ("BiFormer", "BiFormerBlock"),
        ("BiFormer_Block", "BiFormerBlock"),
        ("C2PSA_BRA", "C2BRA"),
        ("C2f_BiFormer", "C3k2BRA"),
        ("C3_Biformer", "C3k2BRA"),
        ("C3k2_BRA", "C3k2BRA"),
    ],
)
def test_unknown_relatives_are_told_the_nearest_block(name: str, nearest: str) -> None:
    message = refusal([-1, 1, name, [64]])
    assert f"no module {name!r}; the nearest one in bra_triton is {nearest!r}" in message
    assert "docs/migration.md" in message


@pytest.mark.parametrize("name", ["C3k2_DCN", "BranchConv", "Libra", "BiFPN"])
def test_other_unknown_names_are_still_ultralytics_to_refuse(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        build([-1, 1, name, [64]])


def test_a_module_of_the_users_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "C2f_BiFormer", nn.Identity, raising=False)
    assert type(build([-1, 1, "C2f_BiFormer", []])[1]) is nn.Identity


def test_a_row_may_give_the_whole_name() -> None:
    model = build(*([-1, 1, f"bra_triton.yolo_integration.{name}", [64]] for name in ("C2BRA", "C3k2BRA")))
    assert [type(row) for row in model[1:3]] == [C2BRA, C3k2BRA]


def test_without_the_import_the_error_of_a_packaged_yaml_says_what_to_import(fresh_python) -> None:
    paths = sorted(map(str, registration.PACKAGED_YAMLS.glob("*.yaml")))
    script = (
        "import sys, traceback\nfrom ultralytics import YOLO\nfor path in sys.argv[1:]:\n"
        "    try:\n        YOLO(path)\n    except KeyError as error:\n        print(error)"
    )
    printed = fresh_python("-c", script, *paths).stdout
    assert len(re.findall(r"^'bra_triton\.yolo_integration\.\w+'$", printed, re.MULTILINE)) == len(paths)


def test_rows_of_the_migration_page_build() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    rows = re.findall(r"^\| `(\[.*?\])` \| `(\[.*?\])` \|", page, re.MULTILINE)
    assert len(rows) > 15
    for elsewhere, here in rows:
        build(pyyaml.safe_load(here))
        row = pyyaml.safe_load(elsewhere)
        if row[3] and elsewhere != here and not hasattr(modules, row[2]):
            refusal(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-1, 1, "BiFormerBlock", [{"topkk": 4}]], "unknown argument 'topkk'; allowed are .* topk, "),
        ([-1, 1, "BiLevelRoutingAttention", [{"mlp_ratio": 4}]], "unknown argument 'mlp_ratio'"),
        ([-1, 1, "nchwBRA", [{"qk_dim": 4}]], "unknown argument 'qk_dim'; allowed are num_heads, n_win, "),
        ([-1, 1, "nchwBRA", [{"c2": 64}]], "rows need no channel count, got the name 'c2'"),
        ([-1, 1, "nchwBRA", [1] * 9], "at most 7 arguments go by position, num_heads, n_win, "),
        ([-1, 1, "nchwBRA", [{"attn_backend": "cuda"}]], "attn_backend must be one of"),
        (
            [-1, 1, "nchwBRA", [4, {"num_heads": 2}]],
            "argument 'num_heads' is given twice, the first time as 4",
        ),
        ([-1, 1, "nchwBRA", [{"topk": 4}, 7]], "positional argument 7 follows named ones"),
        ([-1, 1, "nchwBRA", 4], "args must be a list or a mapping, .* got 4"),
        ([-1, 1, "nchwBRA", "topk"], "args must be a list or a mapping, .* got 'topk'"),
        ([-1, 1, "nchwBRA", ["topk"]], "num_heads must be an int of at least 1, got 'topk'"),
        ([-1, 1, "nchwBRA", [0.5]], "num_heads must be an int of at least 1, got 0.5"),
        ([-1, 1, "nchwBRA", [{"topk": None}]], "topk must be an int of at least 1, got None"),
        ([-1, 1, "BiFormerBlock", [{"topk": 50}]], "topk must be at most .* 25 for n_win=5, got 50"),
        ([-1, 1, "BiFormerBlock", [{"qk_dim": 2.5}]], "qk_dim must be an int of at least 1, got 2.5"),
        ([-1, 1, "BiFormerBlock", [{"mlp_ratio": -4}]], "mlp_ratio must be a number .* got -4"),
        ([-1, 1, "BiFormerBlock", [{"mlp_ratio": "n"}]], "mlp_ratio must be a number, got 'n'"),
        ([-1, 1, "C2BRA", [64, {"e": 0}]], "e must be a number that leaves at least 1 of 64 channels, got 0"),
        ([-1, 1, "C2BRA", [64, {"e": float("inf")}]], "e must be a number .* got inf"),
        ([-1, 1, "C3k2BRA", [64, {"e": True}]], "e must be a number .* got True"),
        ([-1, 1, "C3k2BRA", [64, {"e": 0.001}]], "e must be a number .* got 0.001"),
        ([-1, 1, "C3k2BRA", [64, {"c3k": True}]], "unknown argument 'c3k'"),
        *(
            (
                [-1, 1, "C2BRA", arguments],
                "the first argument must be the output channels, an int of at least 1",
            )
            for arguments in ([], None, [0], [True], [64.0], {"topk": 4})
        ),
        *(
            ([source, 1, "C3k2BRA", [64]], "`from` must be the number of one earlier row, -1 to 0, got ")
            for source in ([-1, 0], 1, -2, False, "-1", None)
        ),
        *(
            ([-1, repeats, "C2BRA", [64]], "repeats must be an int of at least 1, got ")
            for repeats in (0, -1, 1.5, True, "2", None)
        ),
        ([-1, 1, "nchwBRA"], r"a row is \[from, repeats, module, args\], got 3 entries"),
    ],
)
def test_wrong_rows_are_explained(row: list, message: str) -> None:
    assert re.match(message, refusal(row))


def test_errors_name_the_row_that_is_wrong_in_the_head_too() -> None:
    right = [-1, 1, "BiFormerBlock", [{"topk": 4}]]
    assert "got 50" in refusal(right, right, [-1, 1, "BiFormerBlock", [{"topk": 50}]])
    yaml = {"nc": 1, "backbone": [right], "head": [right, [-1, 1, "C2BRA", [64, {"e": 0}]]]}
    with pytest.raises(ValueError, match=r"^row 2, \[-1, 1, 'C2BRA', \[64, \{'e': 0\}\]\]: e must be"):
        tasks.parse_model(yaml, ch=3, verbose=False)


def test_errors_of_other_rows_stay_as_they_are() -> None:
    with pytest.raises(TypeError) as stock:
        tasks.parse_model._bra_triton_wraps(
            {"backbone": [[-1, 1, "Conv", [64, "x"]]], "head": []}, ch=3, verbose=False
        )
    with pytest.raises(TypeError) as error:
        build([-1, 1, "C2BRA", [64]], [-1, 1, "Conv", [64, "x"]])
    assert str(error.value) == str(stock.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [{"kv_per_win": 2}],
            "kv_per_win=2 has no effect without kv_downsample_mode: ada_avgpool or ada_max",
        ),
        ([8, 7, None, None, 2], "kv_per_win=2 has no effect"),
        ([{"kv_downsample_ratio": 4}], "avgpool, maxpool, fracpool or conv"),
        ([{"kv_downsample_mode": "ada_avgpool", "kv_downsample_ratio": 2}], "kv_downsample_ratio=2 has no"),
        ([{"kv_downsample_mode": "avgpool", "kv_downsample_kernel": 3}], "kv_downsample_kernel=3 has no"),
        ([{"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2}], None),
        ([{"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}], None),
        ([8, 7, None, None, 2, 4, None, "ada_maxpool"], None),  # a ratio that only keeps the place
        ([8, 7, None, None, 4, 4, None, "identity", 2], None),
    ],
)
def test_arguments_without_effect_are_warned_of(
    arguments: list, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(yaml_rows.LOGGER, "warning", warnings.append)
    build([-1, 1, "BiLevelRoutingAttention", arguments])
    assert len(warnings) == (message is not None)
    if message:
        assert warnings[0].startswith("row 1, [-1, 1, 'BiLevelRoutingAttention',")
        assert message in warnings[0]


def test_rows_given_are_not_changed() -> None:
    row = [-1, 1, "C2BRA", [64, {"topk": 2}]]
    build(row)
    assert row == [-1, 1, "C2BRA", [64, {"topk": 2}]]
