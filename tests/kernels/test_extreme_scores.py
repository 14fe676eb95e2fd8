"""Scores at the ends of the number range: minus infinity as a mask, very large scores, and NaN."""

from dataclasses import replace
from math import inf, nan

import attention_oracle
import planned
import pytest
import torch
from attention_parts import PARTS, make
from problems import relative_error

from bra_triton import functional
from bra_triton.kernels import calls, forms, tiles
from bra_triton.kernels.forms import MASKED, ROUTED, SMALL_MAP, form_of
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import PackedAttention, RoutedAttention
from bra_triton.spec import AttentionSpec

# Keys of a step: as many as a region has, so that some steps have no finite score.
STEP = 16
POLYNOMIAL = "routed, some exponentials by multiply-adds"
FORMS = ("routed", POLYNOMIAL, "masked", "whole")


@pytest.fixture
def in_form(monkeypatch, device):
    """A function that makes a float32 problem of 4 regions of 16 tokens, and the context for its form."""

    def make_in(form):
        problem = make(PARTS["whole_16" if form == "whole" else "packed_16"], device)
        monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: form == "masked")
        tile = tiles.Tile(16, STEP, 1, 1, exp_share=2 if form == POLYNOMIAL else 0)
        monkeypatch.setattr(tiles, "MASKED_TILES", dict.fromkeys(tiles.KERNELS, tile))
        if form != "whole":
            problem.r_idx.copy_(torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]]))
        assert form_of(problem) == ("routed" if form == POLYNOMIAL else form)
        return problem, tiles.use_tiles(dict.fromkeys(tiles.KERNELS, tile))

    return make_in


def _mask(problem, *regions):
    """Masks all keys of some regions as users do: one channel of each head makes logits of minus infinity."""
    head_dim = problem.qk_head_dim
    problem.query[..., ::head_dim] = 1
    tokens = [(region // 2 * 4, region % 2 * 4) for region in regions]
    for row, column in tokens:
        problem.key[:, row : row + 4, column : column + 4, ::head_dim] = -inf


@pytest.mark.parametrize("form", FORMS)
def test_steps_of_masked_keys_add_nothing(form, in_form):
    """In the channel that masks, the query's gradient is NaN by definition: it contains 0 times infinity."""
    problem, context = in_form(form)
    _mask(problem, *((0, 1) if form == "whole" else (0,)))  # "whole": the map's first four rows
    grad_out = torch.randn_like(problem.value)
    with context:
        actual = attention_oracle.run_backend("triton", problem, grad_out)
    expected = attention_oracle.gradients(problem, grad_out)
    assert expected["out"].isfinite().all()
    assert expected["query"].isnan().any()
    for name, truth in expected.items():
        assert torch.equal(actual[name].isfinite(), truth.isfinite()), name
        # The polynomial's error, where it is used. A masked step that counted would give 1e-1.
        assert relative_error(actual[name].nan_to_num(0, 0, 0), truth.nan_to_num(0, 0, 0)) < 2e-4, name


@pytest.mark.parametrize("form", FORMS)
def test_a_query_without_any_other_key_is_nan(form, in_form):
    problem, context = in_form(form)
    _mask(problem, *((0, 1) if form != "whole" else range(4)))
    with context:
        actual = attention_oracle.run_backend("triton", problem, torch.ones_like(problem.value))["out"]
    expected = attention_oracle.gradients(problem, torch.ones_like(problem.value))["out"]
    assert expected.isnan().any()
    assert torch.equal(actual.isnan(), expected.isnan())


def test_a_small_map_takes_steps_of_masked_keys(device):
    """Masks all 16 keys of the first region: a whole step in float32, half a step in half precision.

    All regions choose it first: the others have masked keys, too, so that all logits are minus infinity.
    """
    qkv = torch.randn(1, 8, 8, 48, device=device)
    qkv[..., 0] = 1
    keys = qkv[0, :, :, 16]
    keys[:4, :4] = keys[::4] = -inf
    qkv.requires_grad_()
    numbers = {"num_heads": 1, "n_win": 2, "topk": 2}
    for dtype in (torch.float32, torch.float16):
        results = []
        for backend in ("triton", "reference"):
            leaf = qkv.detach().to(dtype).requires_grad_()
            with forms.use_form(SMALL_MAP):
                out = functional.bi_level_routing_attention(leaf, **numbers, backend=backend)
            (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf)
            results.append((out.detach(), gradient))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual.isfinite(), expected.isfinite())
            actual, expected = (x.double().nan_to_num(0, 0, 0) for x in (actual, expected))
            assert relative_error(actual, expected) < 8 * torch.finfo(dtype).eps
        assert results[0][0].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "size", "scale"),
    [
        (torch.bfloat16, 24_000, 0.25),  # scores that differ by more than 2**30
        (torch.bfloat16, 24_000, 1e-9),  # the same, but a tiny scale makes ordinary logits of them
        (torch.bfloat16, 1e-4, 1e8),  # tiny scores, but a huge scale makes ordinary logits of them
    ],
)
def test_masked_attention_sees_no_key_that_was_not_chosen(dtype, size, scale, device, monkeypatch):
    """The keys that are not chosen have the largest scores by far."""
    part = PARTS["masked"]
    monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: True)
    problem = make(part, device, dtype)
    problem.query.copy_(problem.query.sign() * size)
    problem.key.copy_(problem.key.sign() * size)
    problem.r_idx.copy_(torch.arange(9, device=device)[:, None] * torch.tensor([1, 0], device=device))
    problem.r_idx[..., 0, 1] = 1  # not region 0 twice
    problem.query[..., 2:4, 4:6, :] = size
    problem.key[..., 4:, :, :] = size  # of regions 6 to 8, which others do not choose
    problem = replace(problem, scale=scale)
    grad_out = torch.randn(problem.value.shape, device=device).to(dtype)
    actual = attention_oracle.run_backend("triton", problem, grad_out)["out"]
    expected = attention_oracle.gradients(problem, grad_out)["out"]
    assert relative_error(actual, expected) < 4 * torch.finfo(dtype).eps


def test_a_scale_too_small_for_the_mask_takes_lists():
    """BiFormer's third stage, which is masked with its usual scale."""
    maps = [torch.empty(1, 14, 14, 32, dtype=torch.float16, device="meta") for _ in range(3)]
    r_idx = torch.empty(1, 1, 49, 16, dtype=torch.int32, device="meta")
    grid = RegionGrid.of_windows(14, 14, 7)
    problem = RoutedAttention(*maps, r_idx, grid, grid, 1, 32**-0.5, distinct=True)
    scales = (problem.scale, forms.LEAST_MASKED_SCALE, forms.LEAST_MASKED_SCALE / 2)
    assert [form_of(replace(problem, scale=scale)) for scale in scales] == [MASKED, MASKED, ROUTED]


def test_nan_stays_nan_where_exponentials_are_multiply_adds(in_form):
    """One key holds the NaN of NVIDIA's units, 0x7FFFFFFF, which would become a probability of 3.4e38."""
    problem, context = in_form(POLYNOMIAL)
    device_nan = torch.full((1,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    # The last key of region 1 is in the last column of a step, which is computed by multiply-adds.
    problem.key[:, 3, 7] = device_nan.to(problem.key.device)
    with context:
        actual = attention_oracle.run_backend("triton", problem, torch.ones_like(problem.value))
    expected = attention_oracle.gradients(problem, torch.ones_like(problem.value))
    for name in ("out", "query"):
        assert expected[name].isnan().any()
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


# The order: three NaN (regions 4, 7 and 9), three +inf (1, 5 and 10), the finite logits, two -inf.
UNORDERED = (1.0, inf, 2.0, -inf, nan, inf, 3.4e38, -nan, 0.0, nan, inf, -1.0, -0.0, 5.0, 0.0, -inf)


@pytest.mark.parametrize("topk", [1, 4, 9, 13, 16])
def test_regions_whose_logits_are_no_numbers_are_ranked_alike(topk, device):
    """All backends rank NaN before +inf, as `torch.sort` does."""
    qkv = torch.zeros(1, 4, 4, 3, device=device)
    qkv[..., 0] = 1
    qkv[..., 1] = torch.tensor(UNORDERED, device=device).view(4, 4)
    found = {
        backend: functional.region_routing(qkv, n_win=4, topk=topk, qk_dim=1, scale=1.0, backend=backend)
        for backend in ("triton", "torch", "reference")
    }
    for r_weight, r_idx in found.values():
        assert torch.equal(r_idx, found["reference"][1])
        assert torch.equal(r_weight.isnan(), found["reference"][0].isnan())


def test_a_small_map_ranks_them_alike(device):
    """The outputs tell which regions are attended to; the tokens themselves are finite."""
    spec = AttentionSpec(16, 16, 1, 4, 6)
    qkv = torch.randn(1, 8, 8, 48, device=device)
    means = torch.zeros(1, 16, 32, device=device)
    means[..., 0] = 1
    means[..., 16] = torch.tensor(UNORDERED, device=device)
    settings = spec.settings(RegionGrid.of_windows(8, 8, 4))
    problem = PackedAttention(qkv, None, None, means, None, None, settings)
    outs = []
    for form in (SMALL_MAP, ROUTED):
        with forms.use_form(form), planned.poisoned():
            outs.append(calls.attend(problem, trains=False)[0])
    assert outs[0].isfinite().all()
    assert relative_error(outs[0], outs[1].double()) < 1e-6
