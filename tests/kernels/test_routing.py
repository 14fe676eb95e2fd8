"""Routing: the choice, ties, NaN, and the gradient of the weights."""

from contextlib import nullcontext

import planned
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CASES, CASES_BY_NAME, random_map, relative_error

from bra_triton import functional, reference
from bra_triton.backend.kernels import fused_kernels
from bra_triton.backend.torch import routing as torch_routing
from bra_triton.backend.torch.regions import whole_map
from bra_triton.call import Call
from bra_triton.kernels.arrays import channels
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.routing.launch import Routing, launch_route_gradient, launch_spread_means
from bra_triton.kernels.routing.lists import launch_inverse
from bra_triton.kernels.routing.plans import plan_route
from bra_triton.operators import routing as operators
from bra_triton.topk import select_topk

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_indices_and_weights_equal_the_reference(case, backend, device):
    qkv = random_map(case, device)
    expected_weight, expected_idx = reference.route(Call(qkv, case.spec))
    r_weight, r_idx = functional.region_routing(
        qkv.float(), n_win=case.n_win, topk=case.topk, qk_dim=case.qk_dim, backend=backend
    )
    assert r_idx.dtype == torch.int64
    assert torch.equal(r_idx, expected_idx)
    assert torch.allclose(r_weight.double(), expected_weight, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_takes_part_in_the_means(backend, device):
    """5 x 7 tokens in 4 x 4 regions of 2 x 2.

    Regions of the last column and of the third row hold 1 or 2 tokens of the map; the fourth row holds none.
    """
    qkv, padding = torch.randn(2, 5, 7, 24, device=device), torch.randn(24, device=device)
    grid = RegionGrid.of_windows(5, 7, 4)
    padded = whole_map(qkv, grid, padding)
    arguments = {"n_win": 4, "topk": 3, "backend": backend}
    expected = functional.region_routing(padded, **arguments)
    actual = functional.region_routing(qkv, padding=padding, **arguments)
    assert torch.equal(actual[1], expected[1])
    assert torch.allclose(actual[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    region=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_without_padding_tokens_past_the_edge_are_left_out_of_the_means(backend, device, sides, region):
    """Compares means and gradient with average pooling, which divides by the number of tokens in the map."""
    region = tuple(min(pair) for pair in zip(sides, region, strict=True))
    grid = RegionGrid.of_region_size(*sides, region)
    qkv = torch.randn(2, *sides, 9, device=device, requires_grad=True)
    twin = qkv.detach().double().requires_grad_()
    pooled = F.avg_pool2d(twin[..., :6].permute(0, 3, 1, 2), region, ceil_mode=True, count_include_pad=False)
    expected = pooled.flatten(2).transpose(1, 2)
    actual = operators.region_means(qkv, None, 3, grid.numbers, backend)
    assert torch.allclose(actual.double(), expected, atol=1e-6)
    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad.double())
    assert torch.allclose(qkv.grad.double(), twin.grad, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["biformer_stage3", "qk_narrow", "padded"])
def test_gradient_of_the_weights_reaches_projection_padding_and_router(name, backend, device):
    """Compares with autograd through the reference in float64. Nearly all regions choose region 0."""
    case = CASES_BY_NAME[name]
    spec = case.spec
    qkv = random_map(case, device)[:, : case.height, : case.width]
    qk_dim = spec.qk_dim
    tensors = [
        *(qkv, torch.randn(spec.packed_dim, device=device).double()),
        *(torch.eye(qk_dim, device=device).double(), torch.randn(qk_dim, device=device).double()),
    ]
    for x in (qkv, tensors[1], tensors[3]):
        x /= 2
    # All queries are shifted by 1 and, by one token with large keys, the mean key of region 0 by 0.6. That
    # adds more to a logit of region 0 than logits vary, but the softmax still has a gradient.
    for queries in (qkv, tensors[1]):
        queries[..., :qk_dim] += 1
    region_tokens = RegionGrid.of_windows(*case.padded, case.n_win).region_tokens
    qkv[:, :1, :1, qk_dim : 2 * qk_dim] += 0.6 * region_tokens
    grad = torch.randn(case.batch, case.n_win**2, case.topk, device=device).double()

    def gradients(dtype, backend):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        r_weight, r_idx = functional.region_routing(
            inputs[0],
            n_win=case.n_win,
            topk=case.topk,
            qk_dim=qk_dim,
            padding=inputs[1],
            diff_routing=True,
            router_weight=inputs[2],
            router_bias=inputs[3],
            backend=backend,
        )
        return r_idx, torch.autograd.grad(r_weight, inputs, grad.to(dtype), allow_unused=True)

    expected_idx, expected = gradients(torch.float64, "reference")
    r_idx, actual = gradients(torch.float32, backend)
    assert torch.equal(r_idx, expected_idx)
    assert (r_idx == 0).sum() > 0.9 * case.batch * case.n_win**2  # a mean row has `topk` pairs
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        # The logits' own rounding goes through a softmax: some units of 1e-6.
        assert a is None or relative_error(a, e) < 3e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_operators_meet_pytorchs_own_checks(backend, device):
    qkv = torch.randn(2, 5, 6, 24, device=device, requires_grad=True)
    padding = torch.randn(24, device=device, requires_grad=True)
    grid = RegionGrid.of_windows(5, 6, 3).numbers
    for fill in (padding, None):
        torch.library.opcheck(operators.region_means, (qkv, fill, 8, grid, backend))
    query, key = (torch.randn(2, 9, 8, device=device, requires_grad=True) for _ in range(2))
    torch.library.opcheck(operators.route, (query, key, 3, 0.5, backend))


@pytest.mark.parametrize(
    ("n_regions", "topk"),
    [
        (1, 1),  # one program for one region
        (4, 3),  # fewer regions than a program takes (16)
        (49, 16),  # 4 programs of 16 query regions, the last of a single one
        (150, 3),  # a row of logits of 256 columns
        (260, 5),  # key regions in two steps, the second of 4
        (513, 2),  # in three steps, the last of a single one
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN")  # NumPy's maximum, in the interpreter
def test_every_cut_of_the_query_regions_into_programs(n_regions, topk, device):
    """Queries and keys are slices of wider rows, and their channels fill no block.

    The last two regions have equal keys, and the logits of the last query region are NaN.
    """
    dim = 41
    means = torch.randn(1 if n_regions > 100 else 2, n_regions, 2 * dim, device=device)
    query, key = means.split(dim, dim=-1)
    if n_regions > 1:
        key[:, -2:] = 3 * query[:, :1]  # the first region's largest logits
        query[:, -1] = torch.nan
    logits = 0.5 * (query[:, :, None].double() * key[:, None].double()).sum(-1)
    expected = logits.nan_to_num(torch.inf).sort(dim=-1, descending=True, stable=True)
    r_weight, r_idx = fused_kernels("triton").route(query, key, topk, 0.5)
    assert torch.equal(r_idx.long(), expected.indices[..., :topk])
    weight = expected.values[..., :topk].softmax(-1)
    assert torch.allclose(r_weight.double(), weight, atol=1e-5, equal_nan=True)


FORMS = {"at once": nullcontext, "in steps": planned.routed_in_steps, "apart": planned.routed_apart}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), n_regions=st.integers(1, 40))
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_choice_among_many_equal_logits_is_a_stable_sorts(data, n_regions, form, device):
    """Chooses up to all regions by logits of both signs, zeros and NaN, most of them equal to others."""
    topk = data.draw(st.integers(1, n_regions))
    logit = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 2.0, float("nan")])
    logits = torch.tensor(data.draw(st.lists(logit, min_size=n_regions, max_size=n_regions)), device=device)
    key, query = logits.view(1, n_regions, 1), torch.ones(1, n_regions, 1, device=device)
    with FORMS[form]():
        r_weight, r_idx = plan_route((query, key), topk, 1.0).run(query, key)
    expected = logits.sort(descending=True, stable=True)
    assert (r_idx == expected.indices[:topk]).all()
    weight = expected.values[:topk].softmax(-1).expand(n_regions, -1)
    assert torch.allclose(r_weight[0], weight, atol=1e-6, equal_nan=True)


def _problem_of_routing(n_regions, topk, dim, device, batch=2):
    """Region queries and keys that are slices of one tensor, the choice, and a gradient; float32."""
    means = torch.randn(batch, n_regions, 2 * dim, device=device)
    means[:, 0, dim:] = means[:, :, :dim].mean(1) * 3  # chosen by many: a long row
    query, key = means.split(dim, dim=-1)
    r_weight, r_idx = fused_kernels("torch").route(query, key, topk, 0.3)
    return query, key, r_weight, r_idx, torch.randn_like(r_weight)


def _autograd_of_routing(query, key, r_idx, grad, scale):
    query, key = (x.double().requires_grad_() for x in (query, key))
    logits = scale * query @ key.transpose(1, 2)
    r_weight = logits.gather(-1, r_idx.long()).softmax(-1)
    return torch.autograd.grad(r_weight, (query, key), grad.double())


SIZES_OF_ROUTING = [
    (1, 1, 5),  # a softmax of one: no gradient
    (9, 2, 16),
    (16, 16, 24),  # all are chosen by all
    (10, 3, 200),  # two blocks of channels, the last not full
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n_regions", "topk", "dim"), SIZES_OF_ROUTING)
def test_gradient_of_the_choice_is_autograds(n_regions, topk, dim, backend, device):
    query, key, r_weight, r_idx, grad = _problem_of_routing(n_regions, topk, dim, device)
    expected = _autograd_of_routing(query, key, r_idx, grad, 0.3)
    with planned.poisoned():
        actual = fused_kernels(backend).route_backward(grad, r_weight, r_idx, query, key, 0.3)
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        # Float32 sums of up to 200 products, whose factors have passed a softmax.
        assert relative_error(a, e) < 1e-5 if topk > 1 else not a.any()


def _add_route_gradient(plan, query, key, r_weight, r_idx, shares, grad_means):
    batch, n_regions, topk = r_idx.shape
    inverse = launch_inverse(plan, r_idx.view(batch, 1, n_regions, topk), n_regions)
    grads = (
        channels(grad_means, 0, query.shape[-1]),
        channels(grad_means, query.shape[-1], 2 * query.shape[-1]),
    )
    launch_route_gradient(plan, Routing(query, key, r_weight, r_idx, 0.3), shares, inverse, *grads)


def test_shares_of_all_heads_and_tiles_are_summed_and_rows_may_be_slices(device):
    """The attention's backward leaves a share for each head and each tile of a region."""
    query, key, r_weight, r_idx, _ = _problem_of_routing(9, 3, 20, device)
    shares = torch.randn(2, 2, 9, 5, 3, device=device)
    expected = _autograd_of_routing(query, key, r_idx, shares.sum((1, 3)), 0.3)
    grad_means = torch.full((2, 9, 40), torch.nan, device=device)
    planned.run(_add_route_gradient, query, key, r_weight, r_idx, shares, grad_means)
    for a, e in zip(grad_means.split(20, dim=-1), expected, strict=True):
        assert relative_error(a, e) < 1e-5


GRIDS = {
    "whole": RegionGrid.of_windows(6, 8, 2),
    "padded": RegionGrid.of_windows(7, 10, 4),
    "more tokens than a tile": RegionGrid.of_windows(13, 13, 2),
    "a token a region": RegionGrid.of_windows(3, 4, 4),
}


@pytest.mark.parametrize("counts_padding", [True, False])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a region that holds no token has no mean
def test_gradient_of_means_is_added_to_the_map(name, dtype, counts_padding, device):
    """In place, and only to the first channels. If padding counts, its share of the gradient is dropped."""
    grid = GRIDS[name]
    grad_means = torch.randn(2, grid.n_regions, 70, device=device)
    grad_qkv = torch.randn(2, grid.height, grid.width, 105, device=device).to(dtype)
    tokens = torch.zeros(2, 70, grid.height, grid.width, device=device).double().requires_grad_()
    bottom, right = grid.padding
    padded, ones = (F.pad(x, (0, right, 0, bottom)) for x in (tokens, torch.ones_like(tokens)))
    region = (grid.region_height, grid.region_width)
    means = F.avg_pool2d(padded, region)
    if not counts_padding:
        means = means / F.avg_pool2d(ones, region)
    expected = grad_qkv.double()
    grad = grad_means.double().transpose(1, 2).view_as(means)
    expected[..., :70] += torch.autograd.grad(means, tokens, grad)[0].permute(0, 2, 3, 1)
    planned.run(launch_spread_means, grad_means, grad_qkv, grid, counts_padding)
    # Only the sum is rounded, once.
    assert torch.allclose(grad_qkv.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_go_to_the_smaller_region(backend, device):
    qkv = torch.ones(1, 8, 8, 24, device=device)
    qkv[:, 2:4, 4:6, 8:16] = 2  # region 6 of 16 stands out; the rest are equal
    _, r_idx = functional.region_routing(qkv, n_win=4, topk=4, backend=backend)
    assert (r_idx == torch.tensor([6, 0, 1, 2], device=device)).all()


@pytest.mark.parametrize("topk", [1, 4, 16])
def test_the_torch_backend_sees_a_logit_equal_to_the_last_that_is_chosen(topk):
    """In each row the last chosen logit equals the next one: `torch.topk` alone might take either of them."""
    logits = torch.stack([torch.randperm(49) for _ in range(200)]).float()
    last, next_one = (logits.topk(topk + 1).values[:, [i]] for i in (-2, -1))
    logits = torch.where(logits == next_one, last, logits)
    found = torch_routing.choose(logits[:, None], torch.eye(49).expand(200, -1, -1), topk, 1.0, weighs=False)
    assert torch.equal(found[1][:, 0].long(), select_topk(logits, topk)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy warns of NaN
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
    out = functional.bi_level_routing_attention(qkv, num_heads=1, n_win=2, topk=2, backend=backend)
    assert out.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_of_another_dtype_counts_in_the_maps(dtype, backend, device):
    """As a module's bias has under autocast: it is rounded to the projection's dtype, not reinterpreted."""
    qkv, padding = torch.randn(1, 3, 3, 24, device=device).to(dtype), 4 * torch.randn(24, device=device)
    numbers = {"n_win": 2, "topk": 2, "backend": backend}
    weights, regions = functional.region_routing(qkv, padding=padding, **numbers)
    expected_weights, expected = functional.region_routing(qkv, padding=padding.to(dtype), **numbers)
    assert torch.equal(regions, expected)
    assert torch.equal(weights, expected_weights)
