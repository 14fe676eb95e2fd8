"""The lists that the attention kernels read: tokens, inverse graph, pieces of its rows."""

import itertools
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import numpy as np
import planned
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import profile

from bra_triton.kernels.forms import MASKED
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import RoutedAttention
from bra_triton.kernels.routing import lists
from bra_triton.kernels.routing.arguments import MARK, Lists
from bra_triton.kernels.routing.launch import Routing, launch_route


def _problem(r_idx, query_grid, kv_grid, factor=None):
    """An attention with one channel a graph: the lists depend only on the graph and the grids."""
    batch, n_graphs = r_idx.shape[:2]
    query, kv = (
        torch.zeros(batch, g.height, g.width, n_graphs, device=r_idx.device) for g in (query_grid, kv_grid)
    )
    return RoutedAttention(query, kv, kv, r_idx, query_grid, kv_grid, n_graphs, 1.0, factor)


def _expected_tokens(grid, regions):
    tokens = [[grid.token(region, index) for index in range(grid.region_tokens)] for region in regions]
    return [-1 if token is None else token for token in itertools.chain(*tokens)]


sides = st.tuples(*[st.integers(1, 7)] * 2)
grids = st.builds(RegionGrid.of_region_size, st.integers(1, 20), st.integers(1, 20), sides)
# Some of these grids have regions that are only padding, for example 10 x 10 tokens in 7 x 7 regions.
windowed_grids = st.builds(RegionGrid.of_windows, st.integers(1, 20), st.integers(1, 20), sides)


def _pairs_by_region(graph, n_regions, query_grid=None):
    """The inverse of a graph `(P, topk)`: the pairs that chose each region.

    Pairs of query regions without a token in the map of `query_grid` are left out.
    """
    rows = [[] for _ in range(n_regions)]
    pair = 0
    for query_region, chosen in enumerate(graph.tolist()):
        for region in chosen:
            if query_grid is None or query_grid.token(query_region, 0) is not None:
                rows[region].append(pair)
            pair += 1
    return rows


@pytest.mark.parametrize("split", [nullcontext, lambda: _split(1)], ids=["at once", "by way of coarser"])
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
        keys, queries = planned.lists_of(_problem(r_idx, query_grid, kv_grid, factor))

    assert keys.query_regions.flatten().tolist() == _expected_tokens(query_grid, range(query_grid.n_regions))
    assert keys.key_regions.flatten().tolist() == _expected_tokens(kv_grid, range(kv_grid.n_regions))
    assert torch.equal(queries.arguments.region_list, keys.key_regions)
    for graph in itertools.product(range(batch), range(n_graphs)):
        for region, row in enumerate(r_idx[graph].tolist()):
            assert keys.key_list[graph][region].tolist() == _expected_tokens(kv_grid, row)
        order = list(itertools.chain(*_pairs_by_region(r_idx[graph], kv_grid.n_regions, query_grid)))
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
    keys, queries = planned.lists_of(_problem(r_idx, grid, grid))
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


def _invert(r_idx, n_regions):
    return planned.run(lists.launch_inverse, r_idx, n_regions)


@contextmanager
def _split(fan_bits):
    """Context in which graphs of more than 2**fan_bits regions are inverted by way of coarser inverses."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_MOST_READ", 0), ("_MOST_SORTED", 0), ("_FAN_BITS", fan_bits)):
            patch.setattr(lists, name, value)
        yield


def _check_inverse(r_idx, n_regions):
    inverse = _invert(r_idx, n_regions)
    batch, n_graphs = r_idx.shape[:2]
    assert inverse.row_start.shape == (batch, n_graphs, n_regions + 1)
    assert inverse.work is None
    for graph in itertools.product(range(batch), range(n_graphs)):
        rows = _pairs_by_region(r_idx[graph], n_regions)
        starts = [0, *itertools.accumulate(map(len, rows))]
        assert inverse.row_start[graph].tolist() == starts
        assert inverse.pairs[graph].tolist() == list(itertools.chain(*rows)), graph


@profile(12)
@given(data=st.data(), n_regions=st.integers(1, 16), n_rows=st.integers(1, 16), batch=st.integers(1, 2))
def test_inverse_graph_holds_each_pair_once_in_order(data, n_regions, n_rows, batch, device):
    topk = data.draw(st.integers(1, n_regions))
    rows = st.permutations(range(n_regions)).map(lambda order: order[:topk])
    graph = [[[data.draw(rows) for _ in range(n_rows)]] for _ in range(batch)]
    _check_inverse(torch.tensor(graph, dtype=torch.int32, device=device), n_regions)


EXTREMES = {
    "all choose region 0, the other rows are empty": (1, lambda q, slot: 0),
    "all choose the last region": (1, lambda q, slot: 24),
    "two regions between them are chosen by all": (1, lambda q, slot: 3 if q % 2 else 7),
    "everyone chooses everyone": (25, lambda q, slot: slot),
    "everyone chooses itself and its successors": (3, lambda q, slot: (q + slot) % 25),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_inverse_graph_and_pieces_at_their_extremes(name, device):
    topk, choose = EXTREMES[name]
    graph = [[[[choose(q, slot) for slot in range(topk)] for q in range(25)]]]
    r_idx = torch.tensor(graph, dtype=torch.int32, device=device)
    _check_inverse(r_idx, 25)
    _check_pieces(r_idx, 25)


def test_inverse_graph_longer_than_one_block(device):
    """49 regions, all chosen by all: 2401 pairs, read in ten blocks of 256."""
    graph = torch.arange(49, dtype=torch.int32, device=device).flip(0).expand(1, 1, 49, 49).contiguous()
    inverse = _invert(graph, 49)
    assert inverse.row_start[0, 0].tolist() == list(range(0, 2402, 49))
    assert (inverse.pairs // 49).view(49, 49).tolist() == [list(range(49))] * 49


def test_lists_of_an_empty_batch(device):
    grid = RegionGrid.of_windows(6, 6, 3)
    r_idx = torch.empty(0, 1, 9, 2, dtype=torch.int32, device=device)
    keys, queries = planned.lists_of(_problem(r_idx, grid, grid))
    assert keys.key_regions.flatten().tolist() == _expected_tokens(grid, range(9))
    assert keys.key_list.shape == (0, 1, 9, 8)
    assert queries.inverse.row_start.shape == (0, 1, 10)
    assert queries.inverse.pairs.shape == (0, 1, 18)


@st.composite
def graphs(draw):
    """Graphs `(N, G, P, topk)` with rows of any lengths, the number of key regions, and of query regions.

    The entries of a graph are all the same region, or drawn from at most three regions, or from all; they may
    repeat in a row. The last number counts only query regions with a token in the map.
    """
    n_regions = draw(st.integers(1, 16))
    region = st.integers(0, n_regions - 1)
    hubs = draw(st.lists(region, min_size=1, max_size=3))
    entry = draw(st.sampled_from([st.just(hubs[0]), st.sampled_from(hubs), region]))
    n_rows, topk = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    batch, n_graphs = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    size = batch * n_graphs * n_rows * topk
    entries = draw(st.lists(entry, min_size=size, max_size=size))
    n_alive = draw(st.just(n_rows) | st.integers(1, n_rows))
    return torch.tensor(entries, dtype=torch.int32).view(batch, n_graphs, n_rows, topk), n_regions, n_alive


@pytest.mark.parametrize(("fan_bits", "block"), [(1, 16), (2, 4), (3, 2048)])
@profile(12)
@given(drawn=graphs())
def test_inverse_by_way_of_coarser_ones(drawn, fan_bits, block, device):
    """16 regions take four inverses or, with more fan bits, two. Some rows are longer than a step."""
    r_idx, n_regions, n_alive = drawn
    with _split(fan_bits), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "_BLOCK_PAIRS", min(block, 16))
        patch.setattr(lists, "_MOST_BLOCK", block)
        _check_inverse(r_idx.to(device), n_regions)
        _check_pieces(r_idx.to(device), n_regions, n_alive)


@pytest.mark.parametrize(
    ("n_graphs", "n_regions", "topk", "inverses"),
    [
        (1, 256, 64, 1),  # 2 * 256 * 256 * 64 choices, the most that one launch may read
        (2, 256, 64, 2),
        (1, 257, 64, 2),
        (64, 255, 4, 1),  # more choices, but up to 255 regions need the lengths of all rows anyway
        (1, 4096, 1, 2),  # 64 rows of 64 regions
        (1, 4097, 1, 3),  # two rows of 4096 regions, 65 of 64
    ],
)
def test_one_inverse_serves_graphs_that_are_soon_read(n_graphs, n_regions, topk, inverses):
    plan = Plan([torch.empty(n_graphs, 1, n_regions, topk, dtype=torch.int32)], torch.device("cpu"))
    lists.launch_inverse(plan, plan.given[0], n_regions)
    assert len(plan.launches) == inverses


@pytest.mark.parametrize("most_read", [0, 2**23], ids=["two inverses", "one"])
def test_inverse_of_many_regions_is_numpys_stable_sort(most_read, device, monkeypatch):
    """Coarse rows have 64 regions, as outside the tests; a fifth of the choices is one region."""
    monkeypatch.setattr(lists, "_MOST_READ", most_read)
    n_regions, generator = 300, np.random.default_rng(0)
    chosen = generator.integers(n_regions, size=(2, n_regions * 9)).astype(np.int32)
    chosen[generator.random(chosen.shape) < 0.2] = n_regions - 2
    inverse = _invert(torch.from_numpy(chosen).view(2, 1, n_regions, 9).to(device), n_regions)
    for graph in range(2):
        pairs = np.argsort(chosen[graph], kind="stable")
        assert np.array_equal(inverse.pairs[graph, 0].cpu(), pairs)
        starts = np.searchsorted(chosen[graph][pairs], np.arange(n_regions + 1))
        assert np.array_equal(inverse.row_start[graph, 0].cpu(), starts)


@profile(20)
@given(drawn=graphs())
def test_pieces_cover_every_row_once_and_none_is_long(drawn, device):
    """However uneven the rows: the longest piece is at most a constant times the mean row."""
    r_idx, n_regions, n_alive = drawn
    _check_pieces(r_idx.to(device), n_regions, n_alive)


@pytest.mark.parametrize("n_regions", [1, 4, 7])
def test_pieces_where_every_region_chooses_all(n_regions, device):
    r_idx = torch.arange(n_regions, dtype=torch.int32, device=device)
    _check_pieces(r_idx.expand(2, 1, n_regions, n_regions).contiguous(), n_regions)


def test_pieces_of_a_row_with_more_than_the_kernel_cuts_at_once(device, monkeypatch):
    """A row of 107 pairs has 27 pieces of at most 4 pairs, cut in two steps of 16."""
    monkeypatch.setattr(lists, "_BLOCK_PAIRS", 16)
    r_idx = torch.full((1, 1, 110, 1), 1, dtype=torch.int32, device=device)
    r_idx[0, 0, :3] = 0
    _check_inverse(r_idx, 110)
    _check_pieces(r_idx, 110)


def _check_pieces(r_idx, n_regions, n_alive=None):
    batch, n_graphs, n_rows, topk = r_idx.shape
    query_grid = RegionGrid(n_alive or n_rows, 1, 1, 1, n_rows, 1)
    kv_grid = RegionGrid.of_region_size(n_regions, 1, (1, 1))
    _, queries = planned.lists_of(_problem(r_idx, query_grid, kv_grid))
    work, longest, n_partials = queries.inverse.work, queries.longest, queries.n_partials
    assert work.shape == (batch, n_graphs, queries.n_pieces, 4)
    assert longest < lists.LONGEST_TO_MEAN * (n_rows * topk / n_regions + 1)
    for graph in itertools.product(range(batch), range(n_graphs)):
        rows = _pairs_by_region(r_idx[graph], n_regions, query_grid)
        starts = [0, *itertools.accumulate(map(len, rows))]
        _check_pieces_of_graph(work[graph].tolist(), starts, longest, n_partials)


def _check_pieces_of_graph(work, starts, longest, n_partials):
    n_regions, pieces, taken = len(starts) - 1, defaultdict(list), []
    assert sorted(region for region, *_ in work[-n_regions:]) == list(range(n_regions))
    if n_regions <= lists._MOST_SORTED:
        whole = [starts[region + 1] - starts[region] for region, *_ in work[-n_regions:]]
        assert whole == sorted(whole, reverse=True)
    assert all(-1 <= region < n_regions for region, *_ in work)
    for region, first, last, partial in work:
        if region >= 0:
            pieces[region].append((first, last, partial))
    for region, mine in pieces.items():
        mine.sort()  # the first piece stands behind the others
        covered = [pair for first, last, _ in mine for pair in range(first, last)]
        assert covered == list(range(starts[region], starts[region + 1]))
        assert all(last - first <= longest for first, last, _ in mine)
        assert len(mine) == 1 or all(last > first for first, last, _ in mine)
        partials = [partial for *_, partial in mine]
        assert partials == ([-1] if len(mine) == 1 else list(range(partials[0], partials[0] + len(mine))))
        taken += [partial for partial in partials if partial >= 0]
    assert len(set(taken)) == len(taken)
    assert all(partial < n_partials for partial in taken)


def test_one_region_that_all_choose_is_cut(device):
    """The bound is not met by chance: without cutting, this row would be 49 times the mean."""
    grid = RegionGrid.of_windows(7, 7, 7)
    r_idx = torch.zeros(1, 1, 49, 1, dtype=torch.int32, device=device)
    _, queries = planned.lists_of(_problem(r_idx, grid, grid))
    work = queries.inverse.work[0, 0]
    assert queries.longest == 4
    assert sorted((work[:, 2] - work[:, 1])[work[:, 0] == 0].tolist()) == [1] + [4] * 12
