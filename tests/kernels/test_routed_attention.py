"""The attention of every backend against one written token by token, in all that the modes are made of."""

from dataclasses import dataclass, replace

import attention_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error, worst

from bra_triton.backend import registry
from bra_triton.kernels import masking
from bra_triton.kernels.launches import lists
from bra_triton.kernels.problem import Padding, RoutedAttention
from bra_triton.kernels.region_grid import RegionGrid

BACKENDS = ("torch", "triton")
# Rounding of float32 gives 1 to 4e-7 at these sizes; a wrong tail, mask or scale gives 1e-3 and more.
FLOAT32_TOLERANCE = 5e-6


@dataclass(frozen=True)
class Part:
    """One problem, and why it is there."""

    why: str
    grid: RegionGrid
    kv_grid: RegionGrid | None = None
    num_heads: int = 2
    head_dims: tuple[int, int] = (16, 16)
    topk: int = 2
    head_graphs: bool = False
    factor: bool = False
    needs_factor: bool = False
    all_choose: int | None = None
    batch: int = 1
    masked: bool = False


def windows(height, width, n_win):
    return RegionGrid.of_windows(height, width, n_win)


PARTS = {
    "packed": Part("the plain mode: slices of one packed map", windows(8, 12, 2), batch=2),
    "padding": Part(
        "a row and a column of padding, and regions that are nothing else", windows(7, 10, 4), num_heads=1
    ),
    "soft": Part("factor of keys and values", windows(8, 8, 2), factor=True, needs_factor=True, topk=3),
    "hard": Part("gradient of a factor of 1 that is not there", windows(8, 8, 2), needs_factor=True, topk=3),
    "frozen_soft": Part("a factor that needs no gradient", windows(4, 4, 2), factor=True),
    "head_graphs": Part(
        "a graph for every head, with factor",
        windows(8, 8, 2),
        head_graphs=True,
        factor=True,
        needs_factor=True,
    ),
    "kv_grid": Part(
        "keys on a grid of another size and number of regions, both padded",
        RegionGrid.of_region_size(7, 9, (3, 4)),
        RegionGrid.of_region_size(5, 6, (2, 2)),
        head_dims=(5, 6),
        head_graphs=True,
        batch=2,
    ),
    "pooled": Part("one key a region", windows(6, 6, 3), windows(3, 3, 3), topk=4, factor=True),
    "long_row": Part(
        "one region that all choose: its row is cut", windows(6, 6, 6), all_choose=3, num_heads=1
    ),
    "long_padded_row": Part(
        "the cut row's region has padding, which the sum of pieces must not lose",
        windows(9, 10, 5),
        num_heads=1,
        all_choose=24,
        factor=True,
        needs_factor=True,
    ),
    "masked": Part("small regions, all in one tile, two images", windows(6, 6, 3), batch=2, masked=True),
    "masked_padding": Part(
        "queries and keys of padding, regions that are nothing else; 36 key regions, so wide marks",
        windows(11, 8, 6),
        masked=True,
    ),
    "masked_far_keys": Part(
        "the one chosen region's keys lie in the last tile: the tiles before it have none",
        windows(12, 12, 6),
        num_heads=1,
        topk=1,
        all_choose=35,
        masked=True,
    ),
    "masked_kv_grid": Part(
        "keys on another grid, heads of other widths, a graph for every head",
        RegionGrid.of_region_size(7, 9, (3, 4)),
        RegionGrid.of_region_size(5, 6, (2, 2)),
        head_dims=(5, 20),
        head_graphs=True,
        batch=2,
        masked=True,
    ),
    "unequal_heads": Part(
        "heads of 5 and 20: tiles of 16 and 32 channels", windows(4, 6, 2), head_dims=(5, 20)
    ),
}


def make(part, device, dtype=torch.float32):
    """A random problem on slices of packed maps, as the modules hand them over."""
    num_heads, (qk, v) = part.num_heads, part.head_dims
    widths = [num_heads * qk, num_heads * qk, num_heads * v]

    def packed(grid, widths):
        shape = (part.batch, grid.height, grid.width, sum(widths))
        return torch.randn(shape, device=device).to(dtype).split(widths, -1)

    query, key, value = packed(part.grid, widths)
    kv_grid = part.kv_grid or part.grid
    if part.kv_grid:
        key, value = packed(kv_grid, widths[1:])
    n_graphs = num_heads if part.head_graphs else 1
    shape = (part.batch, n_graphs, part.grid.n_regions)
    r_idx = torch.rand(*shape, kv_grid.n_regions, device=device).argsort(-1)[..., : part.topk].int()
    if part.all_choose is not None:
        r_idx[..., 0] = part.all_choose
        r_idx[..., 1:] %= part.all_choose
    factor = torch.rand(r_idx.shape, device=device) + 0.5 if part.factor else None
    padding = None
    if kv_grid.is_padded:
        padding = Padding(*(torch.randn(w, device=device).to(dtype) for w in widths[1:]))
    return RoutedAttention(
        query, key, value, r_idx.contiguous(), part.grid, kv_grid, num_heads, qk**-0.5, factor, padding
    )


def _compare(backend, problem, needs_factor):
    grad_out = torch.randn(*problem.query.shape[:3], problem.value.shape[-1]).to(problem.query)
    actual = attention_oracle.run_backend(registry.load(backend), problem, grad_out, needs_factor)
    expected = attention_oracle.gradients(problem, grad_out, needs_factor)
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_output_and_all_gradients(name, backend, device, monkeypatch):
    part = PARTS[name]
    monkeypatch.setattr(masking, "is_cheaper", lambda problem: part.masked)
    errors = _compare(backend, make(part, device), part.needs_factor)
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


def test_long_rows_are_cut_and_the_others_are_not(device):
    """Or the two cases above would not test what they are for."""
    problem = make(PARTS["long_row"], device)
    queries = lists.list_queries(problem)
    lengths = torch.bincount(problem.r_idx.flatten().long(), minlength=problem.kv_grid.n_regions)
    pieces = torch.bincount(queries.work[0, 0, :, 0].clamp(min=-1).long() + 1)[1:]
    assert pieces.tolist() == (-(-lengths // queries.longest)).clamp(min=1).tolist()
    assert lengths[3] == problem.query_grid.n_regions
    assert pieces[3] > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["padding", "long_padded_row", "masked_padding"])
def test_gradients_are_bitwise_equal(name, backend, device, monkeypatch):
    problem, masked = make(PARTS[name], device), PARTS[name].masked
    monkeypatch.setattr(masking, "is_cheaper", lambda problem: masked)
    grad_out = torch.randn(*problem.query.shape[:3], problem.value.shape[-1], device=device)
    first, second = (
        attention_oracle.run_backend(registry.load(backend), problem, grad_out, not masked) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_batch(device):
    problem = make(PARTS["padding"], device)
    empty = {name: getattr(problem, name)[:0] for name in ("query", "key", "value", "r_idx")}
    for backend in BACKENDS:
        grad_out = torch.randn(0, *problem.query.shape[1:3], problem.value.shape[-1], device=device)
        results = attention_oracle.run_backend(
            registry.load(backend), replace(problem, **empty), grad_out, needs_factor=True
        )
        assert results["query"].shape == empty["query"].shape
        assert (results["padding.key"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_the_modes_parts(dtype, backend, device):
    """Within four times the rounding of a single product in that type: scores, weights, output and sums."""
    part = PARTS["long_padded_row"]
    errors = _compare(backend, make(part, device, dtype), part.needs_factor)
    assert worst(errors.values()) < 4 * torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_the_mask(dtype, device, monkeypatch):
    """As above, in tiles that the launch does take in half precision, by its own rule."""
    problem = replace(make(PARTS["masked_padding"], device, dtype), distinct=True)
    assert masking.is_cheaper(problem)
    errors = _compare("triton", problem, False)
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
    assert masking.is_cheaper(_of_map(name)) == MAPS[name][-1]


def test_what_forbids_the_mask():
    problem = _of_map("biformer_stage3")
    wide = replace(problem, **{name: torch.zeros(1, 14, 14, 64).half() for name in ("query", "key", "value")})
    single = replace(problem, query=problem.query.float())
    factor = replace(problem, factor=torch.ones(problem.r_idx.shape))
    for other in (wide, single, factor, replace(problem, distinct=False)):
        assert not masking.is_cheaper(other)


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
    errors = _compare(backend, make(part, device, dtype), part.needs_factor)
    # Drawn problems may have a gradient of next to nothing (one key: dQ is 0), which no relative error suits.
    tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    significant = {name: e for name, e in errors.items() if name in ("out", "value", "padding.value")}
    assert worst(significant.values()) < tolerance, errors
