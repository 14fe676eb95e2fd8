"""The routing index itself: choice, ties, and the inverse graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CASES, random_map

from bra_triton import functional, reference
from bra_triton.kernels import launch

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_indices_and_weights_equal_the_reference(case, backend, device):
    qkv = random_map(case, device)
    expected_weight, expected_idx = reference.route(qkv, case.spec)
    r_weight, r_idx = functional.region_routing(
        qkv.float(), n_win=case.n_win, topk=case.topk, qk_dim=case.qk_dim, backend=backend
    )
    assert r_idx.dtype == torch.int64
    assert torch.equal(r_idx, expected_idx)
    assert torch.allclose(r_weight.double(), expected_weight, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_go_to_the_smaller_region(backend, device):
    qkv = torch.ones(1, 8, 8, 24, device=device)
    qkv[:, 2:4, 4:6, 8:16] = 2  # region 6 of 16 stands out; the rest are equal
    _, r_idx = functional.region_routing(qkv, n_win=4, topk=4, backend=backend)
    assert (r_idx == torch.tensor([6, 0, 1, 2], device=device)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy tells of the NaN
def test_indices_stay_in_range_and_distinct_whatever_the_values(poison, backend, device):
    """A diverged model must end in a NaN loss, not in an illegal memory access."""
    qkv = torch.randn(2, 6, 6, 24, device=device)
    qkv[0, 1, 1] = poison
    qkv[1] = poison
    _, r_idx = functional.region_routing(qkv, n_win=3, topk=5, backend=backend)
    assert ((r_idx >= 0) & (r_idx < 9)).all()
    assert all(len(set(row)) == 5 for row in r_idx.flatten(0, 1).tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_input_gives_nan_output(backend, device):
    qkv = torch.full((1, 4, 4, 24), float("nan"), device=device)
    assert (
        functional.bi_level_routing_attention(qkv, num_heads=1, n_win=2, topk=2, backend=backend)
        .isnan()
        .all()
    )


def _check_inverse(r_idx, n_regions):
    row_start, choosers = launch.inverse_graph(r_idx, n_regions)
    batch, _, topk = r_idx.shape
    assert row_start.shape == (batch, n_regions + 1)
    assert (row_start[:, 0] == 0).all()
    assert (row_start[:, -1] == n_regions * topk).all()
    for image in range(batch):
        for region in range(n_regions):
            row = choosers[image, row_start[image, region] : row_start[image, region + 1]].tolist()
            expected = [
                q for q in range(n_regions) for slot in range(topk) if r_idx[image, q, slot] == region
            ]
            assert row == expected, (image, region)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), n_regions=st.integers(1, 16), batch=st.integers(1, 2))
def test_inverse_graph_holds_each_pair_once_in_order(data, n_regions, batch):
    topk = data.draw(st.integers(1, n_regions))
    rows = st.permutations(range(n_regions)).map(lambda order: order[:topk])
    graph = [[data.draw(rows) for _ in range(n_regions)] for _ in range(batch)]
    _check_inverse(torch.tensor(graph, dtype=torch.int32), n_regions)


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("all choose region 0, the other rows are empty", lambda q, slot: 0),
        ("all choose the last region", lambda q, slot: 24),
        ("everyone chooses everyone", lambda q, slot: slot),
        ("everyone chooses itself and its successors", lambda q, slot: (q + slot) % 25),
    ],
)
def test_inverse_graph_at_its_extremes(name, choose, device):
    topk = 25 if "everyone chooses everyone" in name else (1 if "region" in name else 3)
    graph = [[[choose(q, slot) for slot in range(topk)] for q in range(25)]]
    _check_inverse(torch.tensor(graph, dtype=torch.int32, device=device), 25)


def test_inverse_graph_longer_than_one_block(device):
    """49 regions, all chosen by all: 2401 pairs, read in three blocks of 1024."""
    graph = torch.arange(49, dtype=torch.int32, device=device).flip(0).expand(1, 49, 49).contiguous()
    row_start, choosers = launch.inverse_graph(graph, 49)
    assert row_start[0].tolist() == list(range(0, 2402, 49))
    assert choosers.view(49, 49).tolist() == [list(range(49))] * 49


def test_inverse_graph_of_an_empty_batch(device):
    row_start, choosers = launch.inverse_graph(torch.empty(0, 9, 2, dtype=torch.int32, device=device), 9)
    assert row_start.shape == (0, 10)
    assert choosers.shape == (0, 18)
