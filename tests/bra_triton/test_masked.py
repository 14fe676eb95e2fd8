"""The torch backend under a mask, against the float64 oracle.

On the CPU a mask serves small regions, on NVIDIA (here with stand-ins for PyTorch's kernels) small maps.
"""

from dataclasses import replace

import pretended
import pytest
import torch
from attention_parts import PARTS, Part, compare, make, windows
from problems import worst

from bra_triton.backend.torch import attention as torch_attention
from bra_triton.backend.torch import chunks, masked
from bra_triton.bench.problems import PROBLEMS
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import Gradients, Padding

FLOAT32_TOLERANCE = 5e-6  # as in tests/kernels/test_routed_attention.py
MAPS = {
    "images": Part("three images, which are taken in two parts", windows(6, 6, 3), topk=3, batch=3),
    "padding": PARTS["padding"],
    "a token a region": Part("BiFormer's last stage with a choice", windows(7, 7, 7), topk=24),
    "pooled": Part("one key for each region, queries in padded regions", windows(7, 8, 3), windows(3, 3, 3)),
    "kv_grid": Part(
        "other regions of keys, both padded, heads of 5",
        RegionGrid.of_region_size(7, 9, (3, 4)),
        RegionGrid.of_region_size(5, 6, (2, 2)),
        head_dims=(5, 5),
        batch=2,
    ),
}


@pytest.fixture
def asked(monkeypatch):
    """Masks every attention that can be masked, in parts of at most two images of 36 tokens.

    Gives the list of the masks' shapes, which grows with every masked part.
    """
    mask_of, taken = masked._mask, []

    def recorded(problem):
        mask = mask_of(problem)
        taken.append(mask.shape)
        return mask

    monkeypatch.setattr(masked, "_mask", recorded)
    monkeypatch.setattr(masked, "_REGION", 10**9)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 2 * 36 * 36)
    return taken


@pytest.mark.parametrize("name", MAPS)
def test_output_and_all_gradients(name, asked):
    errors = compare("torch", replace(make(MAPS[name], "cpu"), distinct=True), needs_factor=False)
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors
    parts = 2 if name == "images" else MAPS[name].batch
    assert len(asked) == 2 * parts  # of a forward and a backward
    assert all(shape[0] * shape[2] * shape[3] <= chunks.CHUNK_ELEMENTS or shape[0] == 1 for shape in asked)


# PyTorch's kernels for NVIDIA take no heads of 5.
ON_NVIDIA = MAPS | {"kv_grid": replace(MAPS["kv_grid"], why="the same, heads of 8 and 16", head_dims=(8, 16))}


@pytest.mark.parametrize("name", ON_NVIDIA)
def test_output_and_all_gradients_on_nvidia(name, monkeypatch):
    """One mask for all images of a part, of which there are two where there are three images."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 36 * 36 * 4)
    problem = replace(make(ON_NVIDIA[name], "cpu"), distinct=True)
    with pretended.nvidia() as calls:
        assert masked.is_cheaper(problem, chunks.kernel_of(problem))
        errors = compare("torch", problem, needs_factor=False)
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors
    parts = 2 if name == "images" else ON_NVIDIA[name].batch
    assert sorted(calls) == ["efficient_backward"] * parts + ["efficient_forward"] * parts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["padding", "a token a region"])
def test_half_precision_on_nvidia(name, dtype):
    """Rows of 9 and 49 keys, which the kernels load in steps of 8."""
    with pretended.nvidia():
        errors = compare("torch", replace(make(MAPS[name], "cpu", dtype), distinct=True), needs_factor=False)
    assert worst(errors.values()) < 4 * torch.finfo(dtype).eps, errors


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 1e9), (torch.float16, 3e3)])
def test_large_scores_of_hidden_keys_on_nvidia(dtype, number, monkeypatch):
    """Keys that nobody chose would take the whole softmax."""
    problem = make(Part("", windows(6, 6, 3), topk=2), "cpu", dtype)
    problem = replace(problem, r_idx=torch.randint(0, 4, (1, 1, 9, 1), dtype=torch.int32), distinct=True)
    problem.key[:, 4:] *= number  # regions 6 to 8
    with pretended.nvidia():
        found = torch_attention.attend_routed(problem)
        monkeypatch.setattr(masked, "is_cheaper", lambda *_: False)
        expected = torch_attention.attend_routed(problem)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_without_a_softmax_on_nvidia_is_none_of_hidden_keys(dtype):
    """All keys of the regions that the first row of regions chose have scores of minus infinity."""
    problem = make(Part("", windows(6, 6, 3), topk=2), "cpu", dtype)
    r_idx = torch.tensor([[0, 1]] * 3 + [[4, 5]] * 6, dtype=torch.int32).view(1, 1, 9, 2)
    problem = replace(problem, r_idx=r_idx, distinct=True)
    problem.query[..., ::16] = 1
    problem.key[:, :2, :4, ::16] = -float("inf")
    with pretended.nvidia():
        out, lse = torch_attention.attend_routed(problem)
    assert out[0, :2].isnan().all()
    assert lse[:, :, :2].isnan().all()
    assert out[0, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, asked):
    """Errors of at most four roundings in that dtype: of scores, weights, output and sums."""
    errors = compare("torch", replace(make(MAPS["padding"], "cpu", dtype), distinct=True), needs_factor=False)
    assert worst(errors.values()) < 4 * torch.finfo(dtype).eps, errors
    assert asked


def test_gradients_of_a_factor_are_gathered(asked):
    """Hard routing needs the gradient of a factor of 1. Its forward is masked; its backward gathers, and uses
    the forward's `lse`."""
    errors = compare("torch", replace(make(PARTS["hard"], "cpu"), distinct=True), needs_factor=True)
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors
    assert len(asked) == 1


@pytest.mark.parametrize("which", ["key", "value", "padding"])
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e38])
def test_a_key_that_nobody_chose_reaches_nobody(which, number, asked, monkeypatch):
    """Whatever number the key holds: if a result is not finite, the backend gathers instead. The chosen
    regions, 0, 1 and 3, have no padding."""
    problem = replace(make(Part("", windows(5, 5, 3), topk=2), "cpu"), distinct=True)
    r_idx = torch.tensor([[0, 1], [1, 3]] * 4 + [[0, 3]], dtype=torch.int32).view(1, 1, 9, 2)
    problem = replace(problem, r_idx=r_idx)
    if which == "padding":
        problem = replace(problem, padding=Padding(*(torch.full((32,), number) for _ in range(2))))
    else:
        getattr(problem, which)[0, 4, 4] = number  # in the last region
    grad_out = torch.randn(1, 5, 5, 32)
    gradients = [torch.empty(1, 5, 5, 32) for _ in range(3)]

    def run():
        out, lse = torch_attention.attend_routed(problem)
        maps = Gradients(*gradients)
        small = torch_attention.attention_backward(grad_out, problem, out, lse, maps)
        return [out, lse, *(x.clone() for x in gradients), small.padding.key, small.padding.value]

    found = run()
    assert asked
    monkeypatch.setattr(masked, "is_cheaper", lambda *_: False)
    for actual, expected in zip(found, run(), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected)


def _is_masked(problem):
    return masked.is_cheaper(problem, chunks.kernel_of(problem))


def _problem(name, batch=1, dtype=torch.float32, **others):
    problem = replace(PROBLEMS[name], batch=batch)
    attention = problem.attention(lambda *sizes: torch.empty(sizes, dtype=dtype))
    r_idx = torch.empty(batch, problem.grid.n_regions, problem.topk, dtype=torch.int32)
    return replace(attention.routed(r_idx), **others)


def test_what_is_masked():
    """Masks are used where `bra-bench peers` measured them to be faster, but never if the mask is large."""
    names = ("biformer_stage1", "biformer_stage2", "biformer_stage3", "yolo_p3", "yolo_p4", "yolo_p5")
    assert [name for name in names if _is_masked(_problem(name))] == ["biformer_stage3"]
    assert _is_masked(_problem("biformer_stage3", 64))
    large = replace(PROBLEMS["high_resolution"], topk=63)  # of 64 regions: gathering takes longer
    assert not _is_masked(_problem("high_resolution", r_idx=torch.empty(1, 1, 64, large.topk)))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, ["biformer_stage2", "biformer_stage3", "yolo_p5"]),
        (torch.float32, ["biformer_stage3"]),  # whose products take four times as long, copies twice
        (torch.float64, []),  # no fused kernel
    ],
)
def test_what_is_masked_on_nvidia(dtype, expected):
    names = ("biformer_stage1", "biformer_stage2", "biformer_stage3", "yolo_p3", "yolo_p4", "yolo_p5")
    with pretended.nvidia():
        assert [name for name in names if _is_masked(_problem(name, dtype=dtype))] == expected
        # Regions of one token, which choose 40 of 1600: the mask would be too large.
        grid, r_idx = windows(40, 40, 40), torch.empty(1, 1, 1600, 40, dtype=torch.int32)
        large = _problem("yolo_p4", dtype=dtype, query_grid=grid, kv_grid=grid, r_idx=r_idx)
        assert not _is_masked(large)


@pytest.mark.parametrize(
    ("side", "n_win", "topk", "expected"),
    [
        (28, 7, 16, True),  # a third of the keys, in regions of 16 tokens
        (20, 5, 4, False),  # a sixth of the keys, in regions of 16 tokens
        (14, 7, 4, True),  # a twelfth of the keys, in regions of 4 tokens
        (28, 14, 16, False),  # the same with four times as many keys
        (7, 7, 4, True),  # regions of one token
        (40, 8, 63, False),  # nearly all keys, but the mask would be too large
    ],
)
def test_which_sizes_are_masked(side, n_win, topk, expected):
    grid = windows(side, side, n_win)
    assert masked.is_cheaper_for(grid, grid, topk) == expected


@pytest.mark.parametrize(
    "others",
    [
        {"distinct": False},  # a key that is chosen twice counts twice
        {"factor": torch.ones(1, 1, 49, 16)},
        {"r_idx": torch.empty(1, 8, 49, 16, dtype=torch.int32)},
        {"r_idx": None},
        {"value": torch.empty(1, 14, 14, 512)},
        {"query": torch.empty(1, 14, 14, 256, device="meta")},
    ],
    ids=lambda others: next(iter(others)),
)
def test_what_cannot_be_masked(others):
    assert not _is_masked(_problem("biformer_stage3", **others))
