"""The inverse of a graph of regions, made at once or by way of coarser ones, and the pieces of its rows."""

import itertools
from collections import defaultdict

import numpy as np
import planned
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import profile
from region_graphs import by_way_of_coarser, pairs_by_region, problem_of

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.routing import lists


def _invert(r_idx, n_regions):
    return planned.run(lists.launch_inverse, r_idx, n_regions)


def _check_inverse(r_idx, n_regions):
    inverse = _invert(r_idx, n_regions)
    batch, n_graphs = r_idx.shape[:2]
    assert inverse.row_start.shape == (batch, n_graphs, n_regions + 1)
    assert inverse.work is None
    for graph in itertools.product(range(batch), range(n_graphs)):
        rows = pairs_by_region(r_idx[graph], n_regions)
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
    with by_way_of_coarser(fan_bits), pytest.MonkeyPatch.context() as patch:
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
    _, queries = planned.lists_of(problem_of(r_idx, query_grid, kv_grid))
    work, longest, n_partials = queries.inverse.work, queries.longest, queries.n_partials
    assert work.shape == (batch, n_graphs, queries.n_pieces, 4)
    assert longest < lists.LONGEST_TO_MEAN * (n_rows * topk / n_regions + 1)
    for graph in itertools.product(range(batch), range(n_graphs)):
        rows = pairs_by_region(r_idx[graph], n_regions, query_grid)
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
    _, queries = planned.lists_of(problem_of(r_idx, grid, grid))
    work = queries.inverse.work[0, 0]
    assert queries.longest == 4
    assert sorted((work[:, 2] - work[:, 1])[work[:, 0] == 0].tolist()) == [1] + [4] * 12
