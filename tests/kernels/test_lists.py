"""The lists of tokens that the attention kernels read, and the marks of chosen regions."""

import itertools
from contextlib import nullcontext

import planned
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import profile
from region_graphs import by_way_of_coarser, pairs_by_region, problem_of

from bra_triton.kernels.forms import MASKED
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import RoutedAttention
from bra_triton.kernels.routing import lists
from bra_triton.kernels.routing.arguments import MARK, Lists
from bra_triton.kernels.routing.launch import Routing, launch_route


def _expected_tokens(grid, regions):
    tokens = [[grid.token(region, index) for index in range(grid.region_tokens)] for region in regions]
    return [-1 if token is None else token for token in itertools.chain(*tokens)]


sides = st.tuples(*[st.integers(1, 7)] * 2)
grids = st.builds(RegionGrid.of_region_size, st.integers(1, 20), st.integers(1, 20), sides)
# Some of these grids have regions that are only padding, for example 10 x 10 tokens in 7 x 7 regions.
windowed_grids = st.builds(RegionGrid.of_windows, st.integers(1, 20), st.integers(1, 20), sides)


@pytest.mark.parametrize(
    "split", [nullcontext, lambda: by_way_of_coarser(1)], ids=["at once", "by way of coarser"]
)
@profile(15)
@given(
    data=st.data(),
    query_grid=grids | windowed_grids,
    kv_grid=grids,
    batch=st.integers(1, 2),
    n_graphs=st.integers(1, 2),
    weighs=st.booleans(),
)
def test_lists_hold_the_tokens_of_the_routed_regions_in_order(
    data, query_grid, kv_grid, batch, n_graphs, weighs, split, device
):
    topk = data.draw(st.integers(1, min(3, kv_grid.n_regions)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shape = (batch, n_graphs, query_grid.n_regions, topk)
    r_idx = torch.randint(kv_grid.n_regions, shape, generator=generator, dtype=torch.int32).to(device)
    factor = torch.rand(shape, generator=generator).to(device) if weighs else None
    with split():
        keys, queries = planned.lists_of(problem_of(r_idx, query_grid, kv_grid, factor))

    assert keys.query_regions.flatten().tolist() == _expected_tokens(query_grid, range(query_grid.n_regions))
    assert keys.key_regions.flatten().tolist() == _expected_tokens(kv_grid, range(kv_grid.n_regions))
    assert torch.equal(queries.arguments.region_list, keys.key_regions)
    for graph in itertools.product(range(batch), range(n_graphs)):
        for region, row in enumerate(r_idx[graph].tolist()):
            assert keys.key_list[graph][region].tolist() == _expected_tokens(kv_grid, row)
        order = list(itertools.chain(*pairs_by_region(r_idx[graph], kv_grid.n_regions, query_grid)))
        expected = _expected_tokens(query_grid, [pair // topk for pair in order])
        assert queries.arguments.token_list[graph][: len(expected)].tolist() == expected
        assert queries.inverse.row_start[graph][-1] == len(order)
        if factor is not None:
            expected = factor[graph].flatten()[order].repeat_interleave(query_grid.region_tokens)
            assert torch.equal(queries.arguments.factors[graph][: len(expected)], expected)
    if factor is None:
        assert keys.factors is None
        assert queries.arguments.factors is None
        return
    assert torch.equal(keys.factors, factor.repeat_interleave(kv_grid.region_tokens, -1))


def test_a_region_larger_than_a_block_of_the_kernel(device):
    grid = RegionGrid.of_windows(9, 20, 2)  # 5 x 10 tokens, one row of padding
    r_idx = torch.zeros(1, 1, 4, 1, dtype=torch.int32, device=device)
    keys, queries = planned.lists_of(problem_of(r_idx, grid, grid))
    assert keys.query_regions.flatten().tolist() == _expected_tokens(grid, range(4))
    assert torch.equal(keys.query_regions, keys.key_regions)
    assert queries.arguments.token_list.flatten().tolist() == _expected_tokens(grid, range(4))


@pytest.mark.parametrize("is_padded", [True, False])
def test_one_region_needs_no_graph(is_padded, device):
    """If all regions attend to all, one list of the map serves all kernels; without padding there is none."""
    grid, kv_grid = RegionGrid.of_windows(5, 6, 3).merged, RegionGrid.of_windows(3, 4, 2).merged
    if not is_padded:
        grid, kv_grid = RegionGrid.of_windows(6, 6, 3).merged, RegionGrid.of_windows(4, 4, 2).merged
    query, kv = (torch.zeros(2, g.height, g.width, 1, device=device) for g in (grid, kv_grid))
    problem = RoutedAttention(query, kv, kv, None, grid, kv_grid, 1, 1.0)
    keys, queries = planned.lists_of(problem)
    assert queries.inverse is None
    if not is_padded:
        assert keys == lists.KeyLists(None, None, None, None, None)
        assert queries.arguments == Lists(None, None, None)
        return
    assert keys.key_list.tolist() == keys.key_regions.flatten().tolist() == _expected_tokens(kv_grid, [0])
    assert queries.arguments.token_list.tolist() == _expected_tokens(grid, [0])


def _route_with_lists(plan, query, key, r_weight, r_idx, factors, grid):
    """The lists that `route_kernel` writes, and those of `list_tokens_kernel` for the same graph."""
    batch, n_regions, topk = r_idx.shape
    listed = (batch, 1, n_regions, topk * grid.region_tokens)
    at_once, apart = (
        Lists(
            plan.output((n_regions, grid.region_tokens), torch.int32),
            plan.output(listed, torch.int32),
            plan.output(listed, torch.float32) if factors else None,
        )
        for _ in range(2)
    )
    launch_route(plan, Routing(query, key, r_weight, r_idx, 0.5), at_once, None, grid)
    graph, factor = r_idx.view(batch, 1, n_regions, topk), None
    if factors:
        factor = r_weight.view(batch, 1, n_regions, topk)
    maps = plan.output((batch, grid.height, grid.width, 1), torch.float32)
    problem = RoutedAttention(maps, maps, maps, graph, grid, grid, 1, 1.0, factor)
    key_lists = lists.KeyLists(apart.region_list, apart.region_list, apart.token_list, apart.factors, None)
    lists.launch_key_lists(plan, problem, key_lists)
    return at_once, apart


@pytest.mark.parametrize(
    ("grid", "topk", "batch", "factors"),
    [
        (RegionGrid.of_windows(8, 12, 2), 2, 2, True),
        (RegionGrid.of_windows(8, 12, 2), 3, 2, False),
        # Padding, and regions that are only padding; 25 regions: two programs, the second not full.
        (RegionGrid.of_windows(11, 13, 5), 3, 1, True),
        # 140 tokens a region and 16 choices: more than one step lists.
        (RegionGrid.of_windows(40, 54, 4), 16, 1, False),
    ],
)
@pytest.mark.parametrize("form", [nullcontext, planned.routed_in_steps, planned.routed_apart])
def test_lists_made_while_routing_are_those_of_the_graph(grid, topk, batch, factors, form, device):
    query, key = torch.randn(2, batch, grid.n_regions, 8, device=device)
    r_idx = torch.full((batch, grid.n_regions, topk), -1, dtype=torch.int32, device=device)
    r_weight = torch.full(r_idx.shape, torch.nan, device=device)
    with form():
        at_once, apart = planned.run(_route_with_lists, query, key, r_weight, r_idx, factors, grid)
    expected = _expected_tokens(grid, range(grid.n_regions))
    assert at_once.region_list.flatten().tolist() == expected
    assert at_once.token_list[-1, 0, -1].tolist() == _expected_tokens(grid, r_idx[-1, -1].tolist())
    for one, other in zip(at_once, apart, strict=True):
        assert one is other is None or torch.equal(one, other)


def _route_with_marks(plan, query, key, r_idx, grid):
    """The marks that `route_kernel` writes, and those of `mark_choices_kernel` for the same graph.

    For each kernel: the list of the queries or None, then the marks.
    """
    batch, n_regions, topk = r_idx.shape
    maps = plan.output((batch, grid.height, grid.width, 1), torch.float32)
    problem = RoutedAttention(maps, maps, maps, r_idx.view(batch, 1, n_regions, topk), grid, grid, 1, 1.0)
    at_once, apart = (lists.take_key_lists(problem, MASKED, plan.output) for _ in range(2))
    launch_route(plan, Routing(query, key, None, r_idx, 0.5), *at_once.of_choice, grid)
    lists.launch_key_lists(plan, problem, apart)
    return [(each.query_regions, *each.marks) for each in (at_once, apart)]


@pytest.mark.parametrize(
    ("grid", "topk"),
    [
        (RegionGrid.of_windows(14, 14, 7), 16),  # BiFormer's third stage: four programs, the last not full
        (RegionGrid.of_windows(5, 6, 3), 9),  # padding; every region chosen
        (RegionGrid.of_windows(24, 24, 2), 1),  # 144 tokens a region: more than one step marks
    ],
)
def test_marks_made_while_routing_are_those_of_the_graph(grid, topk, device):
    query, key = torch.randn(2, 2, grid.n_regions, 8, device=device)
    r_idx = torch.full((2, grid.n_regions, topk), -1, dtype=torch.int32, device=device)
    at_once, apart = planned.run(_route_with_marks, query, key, r_idx, grid)
    order = range(grid.height * grid.width)  # of the map, row by row
    assert (at_once[0] is None) != grid.is_padded
    if grid.is_padded:
        order = _expected_tokens(grid, range(grid.n_regions))
        assert at_once[0].flatten().tolist() == apart[0].flatten().tolist() == order
    region_of = {token: r for r in range(grid.n_regions) for token in _expected_tokens(grid, [r])}
    # The number of a padding token, -1, does not tell its region; the list has the tokens region by region.
    expected = [
        at // grid.region_tokens if grid.is_padded else region_of[token] for at, token in enumerate(order)
    ]
    for _, query_regions, query_marks, key_marks in (at_once, apart):
        assert query_regions.tolist() == expected
        # Marks past the last region add nothing, because no key has them.
        products = query_marks[:, 0].double() @ key_marks.double().T
        for image, row in enumerate(r_idx.tolist()):
            is_chosen = torch.tensor([[key in chosen for key in expected] for chosen in row], device=device)
            assert torch.equal(products[image] == 0, is_chosen)
            assert (products[image][~is_chosen] == -(MARK**2)).all()


def test_lists_of_an_empty_batch(device):
    grid = RegionGrid.of_windows(6, 6, 3)
    r_idx = torch.empty(0, 1, 9, 2, dtype=torch.int32, device=device)
    keys, queries = planned.lists_of(problem_of(r_idx, grid, grid))
    assert keys.key_regions.flatten().tolist() == _expected_tokens(grid, range(9))
    assert keys.key_list.shape == (0, 1, 9, 8)
    assert queries.inverse.row_start.shape == (0, 1, 10)
    assert queries.inverse.pairs.shape == (0, 1, 18)
