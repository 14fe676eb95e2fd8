"""The attention of every backend against one written token by token, in all that the modes are made of."""

from dataclasses import dataclass, replace

import attention_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error, worst

from bra_triton.backend import registry
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
def test_output_and_all_gradients(name, backend, device):
    part = PARTS[name]
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
@pytest.mark.parametrize("name", ["padding", "long_padded_row"])
def test_gradients_are_bitwise_equal(name, backend, device):
    problem = make(PARTS[name], device)
    grad_out = torch.randn(*problem.query.shape[:3], problem.value.shape[-1], device=device)
    first, second = (
        attention_oracle.run_backend(registry.load(backend), problem, grad_out, True) for _ in range(2)
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
