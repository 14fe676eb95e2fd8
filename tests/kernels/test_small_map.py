"""Small maps: one program computes routing and attention of a region; compared with float64."""

import planned
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import relative_error, worst
from properties import profile

from bra_triton import reference
from bra_triton.call import Call
from bra_triton.kernels import calls, forms, packed
from bra_triton.kernels.forms import ROUTED, SMALL_MAP
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lib.integers import INVERSE_BITS, inverse
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Needs, PackedAttention
from bra_triton.kernels.small_map import launch
from bra_triton.spec import AttentionSpec

# Rounding of float32 gives 1 to 4e-7; a wrong key, mask or factor 1e-3 and more.
TOLERANCE = 1e-5


def _spec(dim, num_heads, n_win, topk, **others):
    return AttentionSpec(dim, others.pop("qk_dim", dim), num_heads, n_win, topk, **others)


# Specification, height and width of the map, side of LePE's kernel.
CASES = {
    "YOLO's P5 at 320 pixels, 2 x 2 tokens": (_spec(64, 2, 5, 4), 10, 10, 3),
    "padded regions": (_spec(32, 1, 3, 4), 10, 8, 3),
    "more than a step of keys, rectangular": (_spec(32, 1, 3, 5), 12, 9, 5),
    "every row of a tile": (_spec(16, 1, 2, 2), 8, 8, 0),
    "three heads, a program each": (_spec(48, 3, 2, 2), 6, 8, 3),
    "six heads, two a program": (_spec(96, 6, 2, 2), 6, 6, 3),
    "heads of 5": (_spec(20, 4, 3, 4), 9, 9, 3),
    "heads of 24 and 16": (_spec(72, 3, 2, 3, qk_dim=48), 6, 6, 3),
    "wide queries": (_spec(32, 2, 2, 3, qk_dim=64), 6, 6, 0),
    "soft": (_spec(32, 2, 3, 5, soft_routing=True), 9, 9, 3),
    "soft, padded": (_spec(32, 1, 3, 5, soft_routing=True), 4, 7, 5),
    "a region of a token": (_spec(16, 1, 4, 3), 4, 4, 3),
    "regions that are padding alone": (_spec(16, 1, 4, 9), 5, 6, 3),
}


def _tensors(spec, height, width, side, device, batch=1):
    """Float64 tensors of a call; means of the regions lie far apart, so that every precision routes alike."""
    grid = RegionGrid.of_windows(height, width, spec.n_win)
    means = torch.randn(batch, spec.n_win, spec.n_win, spec.packed_dim)
    means = means.repeat_interleave(grid.region_height, 1).repeat_interleave(grid.region_width, 2)
    given = (
        torch.randn(batch, height, width, spec.packed_dim) + means[:, :height, :width],
        torch.randn(spec.dim, 1, side, side) if side else None,
        torch.randn(spec.dim) if side else None,
        torch.randn(spec.packed_dim) if grid.is_padded else None,
    )
    return [None if x is None else x.bfloat16().double().to(device).requires_grad_() for x in given]


def _problem(spec, tensors, dtype=torch.float32):
    qkv, weight, bias, padding = (None if x is None else x.detach().to(dtype) for x in tensors)
    grid = RegionGrid.of_windows(*qkv.shape[1:3], spec.n_win)
    return PackedAttention(qkv, None, padding, None, weight, bias, spec.settings(grid))


def _run(problem, grad_out):
    """Output and gradients, in the order of a call's tensors."""
    needs = Needs(*(x is not None for x in problem.tensors))
    with forms.use_form(SMALL_MAP), planned.poisoned():
        out, saved = calls.attend(problem, trains=True)
        found = calls.attend_backward(grad_out, problem, out, saved, needs)
    return [out, found.qkv, found.lepe_weight, found.lepe_bias, found.padding]


@pytest.mark.parametrize("name", CASES)
def test_output_and_all_gradients(name, device):
    _check_output_and_gradients(name, device)


@pytest.mark.parametrize("name", ["padded regions", "six heads, two a program", "soft"])
def test_where_a_launch_of_its_own_routes(name, device, monkeypatch):
    """`route_kernel` chooses, as in calls of many programs, which would repeat the same choices too often."""
    monkeypatch.setattr(launch, "MOST_ROUTED", 0)
    calls.forget_plans()
    problem = _check_output_and_gradients(name, device, batch=2)
    launches = [launch.name for launch in packed.plan_attend(problem, trains=True).launches]
    calls.forget_plans()
    assert launches == ["region_means_kernel", "route_kernel", "small_map_forward_kernel"]


def _check_output_and_gradients(name, device, batch=1):
    spec, height, width, side = CASES[name]
    tensors = _tensors(spec, height, width, side, device, batch)
    grad_out = torch.randn(batch, height, width, spec.dim, device=device)
    out = reference.attend(Call(tensors[0], spec, *tensors[1:])).out
    leaves = [x for x in tensors if x is not None]
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())]
    problem = _problem(spec, tensors)
    actual = [x for x in _run(problem, grad_out) if x is not None]
    assert len(actual) == len(expected)
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert worst(errors) < TOLERANCE, errors
    return problem


def test_a_region_that_all_choose(device):
    """All queries attend to its keys; the keys of regions that nobody chose have a gradient of 0."""
    spec = _spec(32, 1, 4, 2)
    tensors = _tensors(spec, 8, 8, 0, device)
    with torch.no_grad():
        tensors[0][..., :32] += 4  # the queries' means point one way
        tensors[0][:, :2, :2, 32:64] += 4  # as do the keys of the first region
        tensors[0][:, 2:4, :2, 32:64] += 2
    grad_out = torch.randn(1, 8, 8, 32, device=device)
    call = Call(tensors[0], spec)
    assert (reference.route(call)[1] == torch.tensor([0, 4], device=device)).all()
    out = reference.attend(call).out
    (expected,) = torch.autograd.grad(out, tensors[0], grad_out.double())
    _, actual, *_ = _run(_problem(spec, tensors), grad_out)
    assert relative_error(actual, expected) < TOLERANCE
    assert (actual[:, 4:, :, 32:] == 0).all()


def test_equal_calls_have_equal_bits(device):
    spec, height, width, side = CASES["soft, padded"]
    problem = _problem(spec, _tensors(spec, height, width, side, device), torch.float16)
    grad_out = torch.randn(1, height, width, spec.dim, device=device).half()
    first, second = _run(problem, grad_out), _run(problem, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _chosen(qkv, topk, n_win):
    """The regions that the forward chose, from the tensor that the backward reads: `(N, P, topk)` int32."""
    spec = _spec(qkv.shape[-1] // 3, 1, n_win, topk)
    problem = _problem(spec, [qkv, None, None, None])
    with forms.use_form(SMALL_MAP), planned.poisoned():
        _, (kept,) = calls.attend(problem, trains=True)
        plan = Plan(problem.tensors, problem.qkv.device)
        buffer = packed.ForwardArrays.take(packed._packed(plan, problem), True, plan.keep).r_idx
    end = buffer.offset + 4 * qkv.shape[0] * n_win**2 * topk
    assert (kept[end : end + 4] == 255).all(), "something was stored past the last choice"
    return kept[buffer.offset : end].view(torch.int32).view(buffer.shape)


@profile(15)
@given(
    n_win=st.integers(1, 4),
    data=st.data(),
    values=st.sampled_from([(-1.0, 0.0, 1.0), (0.0, -0.0), (1.0, float("inf"), float("-inf"), float("nan"))]),
)
def test_regions_are_chosen_as_a_stable_sort_has_them(device, n_win, data, values):
    """Of equal logits the smaller region comes first, and NaN before all, as in `route_kernel`."""
    n_regions = n_win**2
    topk = data.draw(st.integers(1, max(1, min(n_regions - 1, 9))))
    keys = data.draw(st.lists(st.sampled_from(values), min_size=n_regions, max_size=n_regions))
    if topk == n_regions:
        return  # a single region attends to itself, and nothing is chosen
    qkv = torch.zeros(1, n_win, n_win, 48, device=device)
    qkv[..., 0] = 1.0
    qkv[..., 16] = torch.tensor(keys, device=device).view(n_win, n_win)
    logits = qkv[..., 16].reshape(-1)
    order = logits.sort(descending=True, stable=True).indices[:topk]
    assert (_chosen(qkv, topk, n_win) == order).all()


@given(st.integers(1, forms.SMALL_MAP_ROWS), st.data())
def test_an_inverse_divides(divisor, data):
    """For all numbers that a program divides: positions among all regions' tokens, and a step past them."""
    most = divisor * forms.MOST_SMALL_MAP_REGIONS + 64
    x = data.draw(st.integers(0, most))
    assert x * inverse(divisor) >> INVERSE_BITS == x // divisor
    assert most * inverse(divisor) < 2**31


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({}, SMALL_MAP),
        ({"topk": 17}, ROUTED),  # 17 x 16 keys
        ({"n_win": 9, "side": 36}, ROUTED),  # 81 regions
        ({"side": 18}, ROUTED),  # regions of 25 tokens, some of them padding
        ({"dim": 128}, ROUTED),  # a head of 128
        ({"dtype": torch.float32, "dim": 64}, ROUTED),  # a head of 64 fits in half precision alone
        ({"diff_routing": True}, ROUTED),  # routing weights learn
    ],
    ids=str,
)
def test_form_follows_the_sizes(change, form):
    numbers = {"side": 16, "dim": 32, "n_win": 4, "topk": 4, "dtype": torch.float16} | change
    if numbers["topk"] == 17:
        numbers |= {"n_win": 5, "side": 20}
    routing = {"diff_routing": True} if "diff_routing" in change else {}
    spec = _spec(numbers["dim"], 1, numbers["n_win"], numbers["topk"], **routing)
    qkv = torch.empty(1, numbers["side"], numbers["side"], spec.packed_dim, dtype=numbers["dtype"])
    problem = _problem(spec, [qkv, None, None, None], numbers["dtype"])
    names = {launch.name for launch in packed.plan_attend(problem, trains=False).launches}
    assert ("small_map_forward_kernel" in names) == (form == SMALL_MAP)
    with forms.use_form(ROUTED):
        names = {launch.name for launch in packed.plan_attend(problem, trains=False).launches}
    assert "attention_forward_kernel" in names


def test_a_step_takes_five_launches():
    """Means, forward, backward, and LePE's backward with the sum of its shares."""
    spec = _spec(32, 1, 4, 4)
    problem = _problem(spec, _tensors(spec, 16, 16, 3, torch.device("cpu")))
    forward = packed.plan_attend(problem, trains=True)
    kept = torch.empty(forward.kept_bytes, dtype=torch.uint8)
    needs = Needs(*(x is not None for x in problem.tensors))
    backward = packed.plan_attend_backward(problem, (torch.empty(1, 16, 16, 32), None, kept), needs)
    names = [launch.name for launch in (*forward.launches, *backward.launches)]
    assert names == [
        "region_means_kernel",
        "small_map_forward_kernel",
        "small_map_backward_kernel",
        "lepe_backward_kernel",
        "finish_gradients_kernel",
    ]


def test_a_form_that_cannot_serve_is_refused():
    """A region of 17 x 1 tokens has one row more than the tile of a program of this form."""
    problem = _problem(_spec(16, 1, (1, 2), 1), [torch.randn(1, 17, 2, 48), None, None, None])
    with forms.use_form(SMALL_MAP), pytest.raises(ValueError, match=r"'small_map' cannot serve .*topk 1"):
        calls.attend(problem, trains=False)
    with (
        pytest.raises(ValueError, match=r"form must be .* or None, got 'nonesuch'"),
        forms.use_form("nonesuch"),
    ):
        pass
