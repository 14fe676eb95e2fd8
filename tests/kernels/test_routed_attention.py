"""Every backend's attention against an oracle written token by token, for all parts of the modes."""

from dataclasses import replace

import attention_oracle
import planned
import pytest
import torch
from attention_parts import PARTS, Part, compare, make, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error, worst

from bra_triton.backend.kernels import fused_kernels
from bra_triton.backend.torch import chunks, gathered
from bra_triton.backend.torch.lepe import lepe_forward
from bra_triton.kernels import forms, tiles
from bra_triton.kernels.attention.arguments import ForwardResults
from bra_triton.kernels.attention.launch import Attention, launch_attention
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import Lepe, RoutedAttention
from bra_triton.kernels.routing import lists

BACKENDS = ("torch", "triton")
# Rounding of float32 gives 1 to 4e-7 at these sizes; a wrong tail, mask or scale gives 1e-3 and more.
FLOAT32_TOLERANCE = 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_output_and_all_gradients(name, backend, device, monkeypatch):
    part = PARTS[name]
    monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: part.masked)
    errors = compare(backend, make(part, device), part.needs_factor)
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


@pytest.mark.parametrize("name", ["soft", "head_graphs", "frozen_soft"])
def test_routing_weights_of_several_chunks_of_the_torch_backend(name, monkeypatch):
    """Every chunk is a region or less and has its own routing weights, whose gradients add up.

    The three images are three parts: keys and values are copied region by region for one image at a time.
    """
    copies, copy = [], gathered._key_value_regions
    monkeypatch.setattr(gathered, "_key_value_regions", lambda part: copies.append(part.batch) or copy(part))
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)
    part = replace(PARTS[name], batch=3)
    errors = compare("torch", make(part, "cpu"), part.needs_factor)
    assert copies == [1] * 6  # three images in the forward, three in the backward
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


@pytest.mark.parametrize(("batch", "most"), [(1, 5), (2, 10), (64, 16)])
def test_a_chunk_on_the_cpu_gathers_no_more_than_small_maps_hold(batch, most, monkeypatch):
    """A region gathers 75 of an image's 400 keys."""
    grid = windows(20, 20, 4)
    maps = (torch.empty(batch, 20, 20, 32, device="meta") for _ in range(3))
    r_idx = torch.empty(batch, 1, 16, 3, dtype=torch.int32, device="meta")
    monkeypatch.setattr(chunks.devices, "kind", lambda x: "cpu")
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 16 * 75 * 64)
    problem = RoutedAttention(*maps, r_idx, grid, grid, 1, 0.25)
    assert chunks.regions_at_once(problem, chunks.FLASH, backward=True) == most
    assert chunks.regions_at_once(problem, chunks.FLASH) // chunks.FORWARD_CHUNKS == most


@pytest.mark.parametrize("widths", [(32, 64), (64, 32)])
def test_forms_for_narrow_heads_do_not_take_wide_values_or_keys(widths):
    """BiFormer's third stage in float16: masked with heads of 32, with wider ones a small map."""
    grid = windows(14, 14, 7)
    r_idx = torch.empty(1, 1, 49, 16, dtype=torch.int32)

    def problem(qk, v):
        maps = (torch.empty(1, 14, 14, c, dtype=torch.float16, device="meta") for c in (qk, qk, v))
        return RoutedAttention(*maps, r_idx, grid, grid, 1, 0.25, distinct=True)

    narrow, wide = problem(32, 32), problem(*widths)
    assert forms.masked_is_cheaper(narrow)
    assert not forms.masked_is_cheaper(wide)
    assert forms.small_map_serves(narrow)
    assert forms.small_map_serves(wide)
    assert not forms.small_map_serves(problem(*(4 * width for width in widths)))


def test_long_rows_are_cut_and_the_others_are_not(device):
    """Otherwise the parts "long_row" and "long_padded_row" would not test cut rows."""
    problem = make(PARTS["long_row"], device)
    _, queries = planned.lists_of(problem)
    lengths = torch.bincount(problem.r_idx.flatten().long(), minlength=problem.kv_grid.n_regions)
    pieces = torch.bincount(queries.inverse.work[0, 0, :, 0].clamp(min=-1).long() + 1)[1:]
    assert pieces.tolist() == (-(-lengths // queries.longest)).clamp(min=1).tolist()
    assert lengths[3] == problem.query_grid.n_regions
    assert pieces[3] > 1


@pytest.mark.parametrize("name", ["padding", "masked_padding"])
def test_regions_of_only_padding_choose_and_are_chosen(name, device):
    """Otherwise these parts would test neither. Other regions have padding beside tokens of the map."""
    problem = make(PARTS[name], device)
    grid = problem.kv_grid
    tokens = [[grid.token(region, i) for i in range(grid.region_tokens)] for region in range(grid.n_regions)]
    n_padding = [region.count(None) for region in tokens]
    assert any(0 < n < grid.region_tokens for n in n_padding)
    only_padding = torch.tensor([n == grid.region_tokens for n in n_padding], device=device)
    assert problem.query_grid == grid
    assert only_padding.any()
    assert only_padding[problem.r_idx[:, :, ~only_padding].long()].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["padding", "long_padded_row", "masked_padding"])
def test_gradients_are_bitwise_equal(name, backend, device, monkeypatch):
    problem, masked = make(PARTS[name], device), PARTS[name].masked
    monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: masked)
    grad_out = torch.randn(*problem.query.shape[:3], problem.value.shape[-1], device=device)
    first, second = (attention_oracle.run_backend(backend, problem, grad_out, not masked) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_batch(device):
    problem = make(PARTS["padding"], device)
    empty = {name: getattr(problem, name)[:0] for name in ("query", "key", "value", "r_idx")}
    for backend in BACKENDS:
        grad_out = torch.randn(0, *problem.query.shape[1:3], problem.value.shape[-1], device=device)
        results = attention_oracle.run_backend(
            backend, replace(problem, **empty), grad_out, needs_factor=True
        )
        assert results["query"].shape == empty["query"].shape
        assert (results["padding.key"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_the_modes_parts(dtype, backend, device):
    """The tolerance, four roundings in that dtype, covers those of scores, weights, output and sums."""
    part = PARTS["long_padded_row"]
    errors = compare(backend, make(part, device, dtype), part.needs_factor)
    assert worst(errors.values()) < 4 * torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_the_mask(dtype, device, monkeypatch):
    """As above, but the launch itself chooses the masked form and its tiles for half precision."""
    problem = replace(make(PARTS["masked_padding"], device, dtype), distinct=True)
    assert forms.masked_is_cheaper(problem)
    errors = compare("triton", problem, False)
    assert worst(errors.values()) < 4 * torch.finfo(dtype).eps, errors


MAPS = {
    # height and width, n_win, topk: whether masked attention is predicted to be cheaper
    "biformer_stage3": (14, 7, 16, True),
    "three_regions_of_four_tokens": (14, 7, 3, True),
    "one_token_a_region": (7, 7, 16, True),
    "yolo_p5": (20, 8, 4, False),
    "regions_of_16": (28, 7, 4, False),
    "regions_of_25": (20, 4, 4, False),
    "too_many_regions": (18, 9, 60, False),
}


def _of_map(name):
    side, n_win, topk, _ = MAPS[name]
    torch.manual_seed(0)
    part = Part("", windows(side, side, n_win), num_heads=1, topk=topk)
    return replace(make(part, torch.device("cpu"), torch.float16), distinct=True)


@pytest.mark.parametrize("name", MAPS)
def test_when_attention_is_masked(name):
    assert forms.masked_is_cheaper(_of_map(name)) == MAPS[name][-1]


def test_what_forbids_the_mask():
    problem = _of_map("biformer_stage3")
    wide = replace(problem, **{name: torch.zeros(1, 14, 14, 64).half() for name in ("query", "key", "value")})
    single = replace(problem, query=problem.query.float())
    factor = replace(problem, factor=torch.ones(problem.r_idx.shape))
    for other in (wide, single, factor, replace(problem, distinct=False)):
        assert not forms.masked_is_cheaper(other)


sizes = st.integers(1, 9)
region_sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@st.composite
def parts(draw):
    grid = RegionGrid.of_region_size(draw(sizes), draw(sizes), draw(region_sizes))
    kv_grid = None
    if draw(st.booleans()):
        kv_grid = RegionGrid.of_region_size(draw(sizes), draw(sizes), draw(region_sizes))
    return Part(
        "drawn",
        grid,
        kv_grid,
        num_heads=draw(st.integers(1, 2)),
        head_dims=(draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        topk=draw(st.integers(1, min(3, (kv_grid or grid).n_regions))),
        head_graphs=draw(st.booleans()),
        factor=draw(st.booleans()),
        needs_factor=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(part=parts(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_problem_on_the_torch_backend(part, dtype):
    _check_drawn("torch", part, dtype)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(part=parts(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_problem_on_the_interpreter(part, dtype):
    _check_drawn("triton", part, dtype)


def _check_drawn(backend, part, dtype):
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    errors = compare(backend, make(part, device, dtype), part.needs_factor)
    # Some gradients of drawn problems are nearly 0 (one key: dQ is 0), so their relative error means nothing.
    tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    significant = {name: e for name, e in errors.items() if name in ("out", "value", "padding.value")}
    assert worst(significant.values()) < tolerance, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["packed", "padding", "kv_grid", "masked", "whole_padding"])
def test_the_backends_function_and_its_backward(name, backend, device, monkeypatch):
    """The gradients are separate, contiguous maps, not slices of packed ones."""
    monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: PARTS[name].masked)
    problem, kernels = make(PARTS[name], device), fused_kernels(backend)
    grad_out = torch.randn(*problem.query.shape[:3], problem.value.shape[-1], device=device)
    with planned.poisoned():
        out, lse = kernels.attend_routed(problem)
        gradients = kernels.attend_routed_backward(grad_out, problem, out, lse)
    expected = attention_oracle.gradients(problem, grad_out)
    actual = {"out": out, "query": gradients.query, "key": gradients.key, "value": gradients.value}
    errors = {name: relative_error(x.cpu(), expected[name]) for name, x in actual.items()}
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors
    assert all(x.is_contiguous() for x in actual.values())


def _add_with_lepe(plan, problem, lepe, out, attention):
    form = forms.form_of(problem)
    key_lists = lists.take_key_lists(problem, form, plan.scratch)
    lists.launch_key_lists(plan, problem, key_lists)
    results = ForwardResults(out, attention, None)
    launch_attention(plan, Attention(problem, form, key_lists), lepe, results)
    return [launch.name for launch in plan.launches]


@pytest.mark.parametrize("keep_attention", [True, False])
@pytest.mark.parametrize("name", ["packed", "padding"])
def test_lepe_in_a_launch_of_its_own_gives_the_same(name, keep_attention, device):
    """The tile's `fuses_lepe` decides; both ways are compared with the torch backend."""
    problem = make(PARTS[name], device)
    dim = problem.value.shape[-1]
    weight, bias = torch.randn(dim, 1, 3, 3, device=device), torch.randn(dim, device=device)
    lepe = Lepe(problem.value, weight, bias, problem.kv_grid, problem.padding and problem.padding.value)
    share_expected, _ = fused_kernels("torch").attend_routed(problem)
    expected = lepe_forward(share_expected, lepe)
    for fuses_lepe in (True, False):
        out = torch.full_like(expected, torch.nan)
        share = torch.full_like(expected, torch.nan) if keep_attention else None
        with tiles.use_tiles({tiles.FORWARD: tiles.Tile(16, 32, 1, 1, fuses_lepe=fuses_lepe)}):
            launches = planned.run(_add_with_lepe, problem, lepe, out, share)
        assert relative_error(out, expected.double()) < FLOAT32_TOLERANCE
        assert share is None or relative_error(share, share_expected.double()) < FLOAT32_TOLERANCE
        assert ("lepe_forward_kernel" in launches) != fuses_lepe


FORMS = {  # of the tiles of forward, dQ and dK/dV
    "packed": ("plain", "plain", "plain"),
    "padding": ("padded", "padded", "padded"),
    "head_graphs": ("weighted", "weighted", "weighted"),
    "unequal_heads": ("padded", "padded", "padded"),
    "soft": ("weighted", "weighted", "weighted"),
    "hard": ("plain", "weighted", "plain"),
}


@pytest.mark.parametrize("name", FORMS)
def test_launches_ask_for_the_tile_of_their_form(name, device, monkeypatch):
    """The tuner takes care that a form's tiles do not spill, so a launch must ask for the right form."""
    asked = {}

    def choose(kernel, dtype, head_dim, region_tokens, device, form):
        asked[kernel] = form
        return tiles.Tile(16, 32, 1, 1)

    monkeypatch.setattr(tiles, "choose", choose)
    problem = make(PARTS[name], device)
    grad_out = torch.zeros(*problem.query.shape[:3], problem.value.shape[-1], device=device)
    attention_oracle.run_backend("triton", problem, grad_out, PARTS[name].needs_factor)
    assert asked == dict(zip(tiles.KERNELS, FORMS[name], strict=True))


def test_a_graph_for_every_head_is_a_form_of_its_own():
    heads = {"heads": (32, 32), "is_padded": False, "is_weighted": False}
    assert tiles.tile_form(**heads, n_graphs=1) == tiles.PLAIN
    assert tiles.tile_form(**heads, n_graphs=4) == tiles.PADDED
