"""Yaml rows that are wrong, or set something without effect: the errors and warnings."""

import re

import pytest
import yaml as pyyaml
from rows import build, refusal
from ultralytics.nn import tasks

from bra_triton.yolo_integration import registration, yaml_rows


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


@pytest.mark.parametrize(
    ("name", "arguments", "instead"),
    [
        ("BiFormerBlock", [8, 7], "[]"),
        ("BiFormerBlock", [0.5], "[]"),  # it has no `e`
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
        ("BiFormerCSPBlock", "C3k2BRA"),
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


def test_without_the_import_the_error_of_a_packaged_yaml_says_what_to_import(fresh_python) -> None:
    paths = sorted(map(str, registration.PACKAGED_YAMLS.glob("*.yaml")))
    script = (
        "import sys, traceback\nfrom ultralytics import YOLO\nfor path in sys.argv[1:]:\n"
        "    try:\n        YOLO(path)\n    except KeyError as error:\n        print(error)"
    )
    printed = fresh_python("-c", script, *paths).stdout
    assert len(re.findall(r"^'bra_triton\.yolo_integration\.\w+'$", printed, re.MULTILINE)) == len(paths)


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
        ([-1, 1, "nchwBRA"], r"a row is \[from, repeats, module, args\], in this order, got 3 entries"),
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


@pytest.mark.parametrize(
    "row",
    [
        [-1, "C2BRA", [64]],  # no repeats; parse_model's own error names no row
        ["C2BRA", [64]],
        [-1, 1, [64], "C2BRA"],
        [-1, 1, "C2BRA"],
        [-1, 1, "C2BRA", [64], {"topk": 4}],
    ],
)
def test_a_row_of_a_block_has_four_entries_in_their_order(row: list) -> None:
    assert refusal(row) == f"a row is [from, repeats, module, args], in this order, got {len(row)} entries"


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
