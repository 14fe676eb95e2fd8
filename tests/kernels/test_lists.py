"""The lists that the attention kernels walk: tokens, inverse graph, pieces of its rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import RoutedAttention
from bra_triton.kernels.routing import lists


def _problem(r_idx, query_grid, kv_grid, factor=None):
    """An attention of the least channels: the lists depend on graph and grids alone."""
    batch, n_graphs = r_idx.shape[:2]
    query, kv = (
        torch.zeros(batch, g.height, g.width, n_graphs, device=r_idx.device) for g in (query_grid, kv_grid)
    )
    return RoutedAttention(query, kv, kv, r_idx, query_grid, kv_grid, n_graphs, 1.0, factor)


def _expected_tokens(grid, regions):
    tokens = [[grid.token(region, index) for index in range(grid.region_tokens)] for region in regions]
    return [-1 if token is None else token for token in itertools.chain(*tokens)]


grids = st.builds(
    RegionGrid.of_region_size, st.integers(1, 20), st.integers(1, 20), st.tuples(*[st.integers(1, 7)] * 2)
)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), query_grid=grids, kv_grid=grids, n_graphs=st.integers(1, 2))
def test_lists_hold_the_tokens_of_the_routed_regions_in_order(data, query_grid, kv_grid, n_graphs, device):
    topk = data.draw(st.integers(1, min(3, kv_grid.n_regions)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shape = (1, n_graphs, query_grid.n_regions, topk)
    r_idx = torch.randint(kv_grid.n_regions, shape, generator=generator, dtype=torch.int32).to(device)
    problem = _problem(r_idx, query_grid, kv_grid, torch.rand(shape, generator=generator).to(device))

    keys = lists.list_keys(problem)
    assert keys.region_list.flatten().tolist() == _expected_tokens(query_grid, range(query_grid.n_regions))
    for graph, region in itertools.product(range(n_graphs), range(query_grid.n_regions)):
        row = r_idx[0, graph, region]
        assert keys.key_list[0, graph, region].tolist() == _expected_tokens(kv_grid, row.tolist())
        expected = problem.factor[0, graph, region].repeat_interleave(kv_grid.region_tokens)
        assert torch.equal(keys.factors[0, graph, region], expected)

    queries = lists.list_queries(problem)
    assert queries.region_list.flatten().tolist() == _expected_tokens(kv_grid, range(kv_grid.n_regions))
    _, pairs = lists.inverse_graph(r_idx, kv_grid.n_regions)
    for graph in range(n_graphs):
        order = pairs[0, graph].long()
        assert queries.query_list[0, graph].tolist() == _expected_tokens(query_grid, (order // topk).tolist())
        expected = problem.factor[0, graph].flatten()[order].repeat_interleave(query_grid.region_tokens)
        assert torch.equal(queries.factors[0, graph], expected)


def test_a_region_larger_than_a_block_of_the_kernel(device):
    grid = RegionGrid.of_windows(9, 20, 2)  # 5 x 10 tokens, one row of padding
    keys = lists.list_keys(_problem(torch.zeros(1, 1, 4, 1, dtype=torch.int32, device=device), grid, grid))
    assert keys.region_list.flatten().tolist() == _expected_tokens(grid, range(4))
    assert keys.factors is None


def _check_inverse(r_idx, n_regions):
    row_start, pairs = lists.inverse_graph(r_idx, n_regions)
    batch, n_graphs, n_rows, topk = r_idx.shape
    assert row_start.shape == (batch, n_graphs, n_regions + 1)
    for graph in itertools.product(range(batch), range(n_graphs)):
        chosen = r_idx[graph].flatten().tolist()
        starts = row_start[graph].tolist()
        assert (starts[0], starts[-1]) == (0, n_rows * topk)
        for region in range(n_regions):
            expected = [pair for pair, choice in enumerate(chosen) if choice == region]
            assert pairs[graph][starts[region] : starts[region + 1]].tolist() == expected, (graph, region)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), n_regions=st.integers(1, 16), n_rows=st.integers(1, 16), batch=st.integers(1, 2))
def test_inverse_graph_holds_each_pair_once_in_order(data, n_regions, n_rows, batch, device):
    topk = data.draw(st.integers(1, n_regions))
    rows = st.permutations(range(n_regions)).map(lambda order: order[:topk])
    graph = [[[data.draw(rows) for _ in range(n_rows)]] for _ in range(batch)]
    _check_inverse(torch.tensor(graph, dtype=torch.int32, device=device), n_regions)


EXTREMES = {
    "all choose region 0, the other rows are empty": (1, lambda q, slot: 0),
    "all choose the last region": (1, lambda q, slot: 24),
    "everyone chooses everyone": (25, lambda q, slot: slot),
    "everyone chooses itself and its successors": (3, lambda q, slot: (q + slot) % 25),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_inverse_graph_at_its_extremes(name, device):
    topk, choose = EXTREMES[name]
    graph = [[[[choose(q, slot) for slot in range(topk)] for q in range(25)]]]
    _check_inverse(torch.tensor(graph, dtype=torch.int32, device=device), 25)


def test_inverse_graph_longer_than_one_block(device):
    """49 regions, all chosen by all: 2401 pairs, read in ten blocks of 256."""
    graph = torch.arange(49, dtype=torch.int32, device=device).flip(0).expand(1, 1, 49, 49).contiguous()
    row_start, pairs = lists.inverse_graph(graph, 49)
    assert row_start[0, 0].tolist() == list(range(0, 2402, 49))
    assert (pairs // 49).view(49, 49).tolist() == [list(range(49))] * 49


def test_inverse_graph_of_an_empty_batch(device):
    row_start, pairs = lists.inverse_graph(torch.empty(0, 1, 9, 2, dtype=torch.int32, device=device), 9)
    assert row_start.shape == (0, 1, 10)
    assert pairs.shape == (0, 1, 18)


rows_of_pairs = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 30]), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(lengths=rows_of_pairs)
def test_pieces_cover_every_row_once_and_none_is_long(lengths, device):
    """However uneven the rows: the longest piece is at most a constant times the mean row."""
    _check_pieces(lengths, device)


def test_pieces_of_more_rows_than_the_kernel_takes_at_once(device):
    """Rows of 0, 1 and, among the last of a block and the first of the next, 30 pairs."""
    _check_pieces([30 if region % 17 == 0 else region % 2 for region in range(600)], device)


def _check_pieces(lengths, device):
    n_pairs, n_regions = sum(lengths), len(lengths)
    if n_pairs == 0:
        return
    row_start = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    row_start = row_start.view(1, 1, -1)
    work, longest, n_partials = lists.cut_rows(row_start, n_pairs)
    pieces = [piece for piece in work[0, 0].tolist() if piece[0] >= 0]
    assert [region for region, *_ in pieces[:n_regions]] == list(range(n_regions))
    for region, length in enumerate(lengths):
        mine = [piece for piece in pieces if piece[0] == region]
        covered = [pair for _, first, last, _ in mine for pair in range(first, last)]
        start = sum(lengths[:region])
        assert covered == list(range(start, start + length))
        partials = [partial for *_, partial in mine]
        assert partials == ([-1] if len(mine) == 1 else list(range(partials[0], partials[0] + len(mine))))
    used = sorted(partial for *_, partial in pieces if partial >= 0)
    assert used == list(range(len(used)))
    assert len(used) <= n_partials
    mean = n_pairs / n_regions
    assert max(last - first for _, first, last, _ in pieces) <= longest
    assert longest < lists.LONGEST_TO_MEAN * (mean + 1)


def test_one_region_that_all_choose_is_cut(device):
    """The bound is not met by chance: without cutting this row would be 49 times the mean."""
    r_idx = torch.zeros(1, 1, 49, 1, dtype=torch.int32, device=device)
    row_start, pairs = lists.inverse_graph(r_idx, 49)
    work, longest, _ = lists.cut_rows(row_start, pairs.shape[-1])
    assert longest == 4
    assert (work[0, 0, :, 2] - work[0, 0, :, 1])[work[0, 0, :, 0] == 0].tolist() == [4] * 12 + [1]
