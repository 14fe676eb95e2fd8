"""The drop-in module on both fused backends, compared with the float64 reference."""

import itertools

import pytest
import torch
from interpreter import INTERPRETED
from modules import reference_of, run
from problems import CASES_BY_NAME, Case, cases_for, random_map, relative_error, worst

from bra_triton import BiLevelRoutingAttention, functional, reference
from bra_triton.backend.torch import chunks, masked
from bra_triton.bench import measure
from bra_triton.call import Call
from bra_triton.spec import AttentionSpec

BACKENDS = ("torch", "triton")
# For `relative_error`, the norm of the difference divided by the norm of the truth. Rounding of float32 gives
# 1 to 4e-7 at these sizes; a wrong tail, mask or scale gives 1e-3 and more.
FLOAT32_TOLERANCE = 1e-5


def _pair(case, backend, device, **arguments):
    """The drop-in in float32 and the reference in float64, with the same weights."""
    module = BiLevelRoutingAttention(
        case.dim, case.num_heads, case.n_win, case.qk_dim, topk=case.topk, backend=backend, **arguments
    ).to(device)
    return module, reference_of(module)


@pytest.mark.parametrize(
    ("case", "backend"), [pytest.param(c, b, id=f"{c.name}-{b}") for c, b in cases_for(BACKENDS, INTERPRETED)]
)
def test_float32_matches_float64_reference(case, backend, device):
    module, oracle = _pair(case, backend, device, auto_pad=True)
    x = random_map(case, device, case.dim)[:, : case.height, : case.width]
    grad_out = torch.randn(*x.shape, dtype=torch.float64, device=device)
    actual, expected = run(module, x.float(), grad_out), run(oracle, x, grad_out)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


@pytest.mark.parametrize(
    ("param_attention", "side_dwconv", "backend"),
    # Only two cases for "triton": the interpreter is slow, and kernels do not depend on the projections.
    [(*each, "torch") for each in itertools.product(("qkvo", "qkv"), (0, 3, 5))]
    + [("qkvo", 0, "triton"), ("qkv", 5, "triton")],
)
def test_lepe_and_projection_variants(side_dwconv, param_attention, backend, device):
    case = CASES_BY_NAME["rectangular"]
    module, oracle = _pair(case, backend, device, side_dwconv=side_dwconv, param_attention=param_attention)
    x = random_map(case, device, case.dim)
    grad_out = torch.randn(*x.shape, dtype=torch.float64, device=device)
    actual, expected = run(module, x.float(), grad_out), run(oracle, x, grad_out)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in ("rectangular", "tokens_10x10", "head_5", "head_64", "qk_narrow")]
    + [("rectangular", torch.bfloat16), ("head_64", torch.bfloat16)],
)
def test_half_precision_errs_at_most_twice_as_much_as_the_reference_in_that_dtype(
    name, dtype, backend, device
):
    case = CASES_BY_NAME[name]
    spec = case.spec
    qkv = random_map(case, device)
    lepe = torch.randn(case.dim, 1, 3, 3, device=device).to(dtype).double() / 3
    grad_out = torch.randn(*qkv.shape[:3], case.dim, device=device).to(dtype).double()

    def attend(backend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (qkv, lepe)]
        out = functional.attend(Call(inputs[0], spec, inputs[1]), backend)
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype))

    routes = [set_of(reference.route(Call(qkv.to(d), spec))[1]) for d in (torch.float64, dtype)]
    assert routes[0] == routes[1], "the regions of this case must lie far enough apart to route alike"
    truth = attend("reference", torch.float64)
    plain, actual = attend("reference", dtype), attend(backend, dtype)
    # Triton's interpreter truncates to bfloat16, while a GPU rounds: its error may be twice as large.
    cut_off = backend == "triton" and dtype == torch.bfloat16 and INTERPRETED
    for label, t, p, a in zip(("out", "qkv", "lepe"), truth, plain, actual, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, t) <= (4 if cut_off else 2) * relative_error(p, t), label


def set_of(r_idx):
    return r_idx.sort(-1).values.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tokens_5x5", "qk_narrow"])
def test_scores_far_below_zero(name, backend, device):
    """With `lse` near -3000 the exponential of a masked key's score must not overflow."""
    case = CASES_BY_NAME[name]
    qkv = random_map(case, device)
    qk_dim = case.spec.qk_dim
    qkv[..., :qk_dim] += 20
    qkv[..., qk_dim : 2 * qk_dim] -= 20
    grad_out = torch.randn(*qkv.shape[:3], case.dim, dtype=torch.float64, device=device)

    def gradient(backend, x):
        out = functional.attend(Call(x.requires_grad_(), case.spec), backend)
        return torch.autograd.grad(out, x, grad_out.to(x))[0]

    expected, actual = gradient("reference", qkv.clone()), gradient(backend, qkv.float())
    # Float32 rounds scores of 3000 by up to 3000 * 6e-8 = 1.8e-4, which sets this tolerance.
    assert relative_error(actual, expected) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_products_past_its_range(backend, device):
    """A product of query and key is 64 * 40 * 40 = 102400 before the scale; float16 ends at 65504."""
    qkv = torch.full((1, 4, 4, 64 + 64 + 32), 40.0, device=device, dtype=torch.float16)
    out = functional.bi_level_routing_attention(qkv, num_heads=1, n_win=2, topk=2, qk_dim=64, backend=backend)
    assert (out == 40).all()


def test_regions_too_large_for_a_chunk_are_split(monkeypatch):
    """Heads whose keys and values differ in width take the torch backend's unfused path, which stores scores:
    64 x 128 of a region here."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1000)
    case = Case("split", "regions of 64 tokens", 16, 16, 32, 1, 2, 2, 16)
    module, oracle = _pair(case, "torch", torch.device("cpu"))
    x = random_map(case, torch.device("cpu"), case.dim)
    grad_out = torch.randn(*x.shape, dtype=torch.float64)
    actual, expected = run(module, x.float(), grad_out), run(oracle, x, grad_out)
    assert worst(relative_error(actual[name], expected[name]) for name in expected) < FLOAT32_TOLERANCE


def test_memory_of_the_torch_backend_is_linear_in_the_map():
    """Twice the side gives regions of four times as many tokens, and sixteen times as many scores in all: the
    unfused path must not store them all at once."""
    spec = AttentionSpec(32, 16, 1, 2, 1)
    peaks = []
    for side in (64, 128):
        qkv = torch.randn(1, side, side, spec.packed_dim)
        peaks.append(
            measure.peak_bytes(lambda qkv=qkv: functional.attend(Call(qkv, spec), "torch"), qkv.device)
        )
    assert peaks[1] < 5 * peaks[0], peaks


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend=backend).to(device)
    x = torch.randn(0, 8, 8, 32, device=device, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 8, 8, 32)
    assert all((p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend, device):
    """An NCHW map that was permuted to NHWC, and a slice of a map with more channels."""
    module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend=backend).to(device)
    nchw = torch.randn(2, 32, 8, 8, device=device)
    wide = torch.randn(2, 8, 8, 40, device=device)
    for x in (nchw.permute(0, 2, 3, 1), wide[..., :32]):
        # The bits may differ: cuBLAS uses other kernels for other strides. Wrong strides give an error of 1.
        assert relative_error(module(x), module(x.contiguous()).double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_accepts_a_strided_projection(backend, device):
    case = CASES_BY_NAME["rectangular"]
    qkv = random_map(case, device).float()
    wide = torch.cat([qkv, qkv], -1)[..., : qkv.shape[-1]]
    options = {"num_heads": case.num_heads, "n_win": case.n_win, "topk": case.topk, "backend": backend}
    assert torch.equal(
        functional.bi_level_routing_attention(wide, **options),
        functional.bi_level_routing_attention(qkv, **options),
    )


DOWNSAMPLING = ("ada_avgpool", "ada_maxpool", "avgpool", "maxpool", "fracpool", "conv")
MODES = {
    **{mode: {"kv_downsample_mode": mode} for mode in DOWNSAMPLING},
    "fracpool": {"kv_downsample_mode": "fracpool", "kv_downsample_ratio": 1.5},
    "soft": {"soft_routing": True},
    "soft_diff": {"soft_routing": True, "diff_routing": True},
    "hard": {"diff_routing": True},
    "hard_param": {"diff_routing": True, "param_routing": True},
    "soft_param_maxpool": {
        "soft_routing": True,
        "diff_routing": True,
        "param_routing": True,
        "kv_downsample_mode": "maxpool",
    },
    "hard_conv": {"diff_routing": True, "kv_downsample_mode": "conv", "kv_downsample_kernel": 3},
}
# Regions of 3 x 4 tokens, so that pooling leaves a remainder; and a map that padding extends to this size.
MODE_MAPS = {"divisible": (6, 8), "padded": (5, 7)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", MODE_MAPS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_matches_the_float64_reference(mode, size, backend, device):
    """Output and the gradients of input and all parameters, those of the router included."""
    case = Case(mode, "", *MODE_MAPS[size], dim=24, num_heads=2, n_win=2, topk=3, qk_dim=16)
    arguments = {"kv_per_win": 2, "kv_downsample_ratio": 2, **MODES[mode]}
    module, oracle = _pair(case, backend, device, auto_pad=size == "padded", **arguments)
    module.eval(), oracle.eval()  # in training, fractional pooling draws other samples for each
    x = random_map(case, device, case.dim)[:, : case.height, : case.width]
    grad_out = torch.randn(*x.shape, dtype=torch.float64, device=device)
    actual, expected = run(module, x.float(), grad_out), run(oracle, x, grad_out)
    assert {k for k, v in actual.items() if v is None} == {k for k, v in expected.items() if v is None}
    errors = {
        name: relative_error(actual[name], expected[name])
        for name, value in expected.items()
        # A bias of all keys shifts all scores of a query alike, so its gradient is 0, with rounding noise.
        if value is not None and not (name == "kv_down.key.bias" and not module.spec.soft_routing)
    }
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_fractional_pooling_in_training_is_the_references_for_the_same_samples(backend, device):
    case = Case("fracpool", "", 14, 14, dim=16, num_heads=1, n_win=2, topk=2)
    module, oracle = _pair(case, backend, device, kv_downsample_mode="fracpool", kv_downsample_ratio=1.5)
    x = random_map(case, device, case.dim)
    outs = []
    for each, dtype in ((module, torch.float32), (oracle, torch.float64), (module, torch.float32)):
        torch.manual_seed(len(outs) // 2)
        outs.append(each.train()(x.to(dtype)))
    assert relative_error(outs[0], outs[1]) < FLOAT32_TOLERANCE
    assert not torch.equal(outs[0], outs[2])


class TestDeterminism:
    """Two backward passes give the same bits; the control shows that the comparison can fail."""

    @pytest.fixture(autouse=True)
    def _several_threads(self):
        """Uses more threads than the tests' workers, so that a changing order of sums can show on the CPU."""
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        yield
        torch.set_num_threads(threads)

    @staticmethod
    def _gradients(qkv, lepe_weight, spec, grad_out, backend):
        inputs = [x.clone().requires_grad_() for x in (qkv, lepe_weight, lepe_weight[:, 0, 0, 0])]
        call = Call(inputs[0], spec, *inputs[1:])
        return torch.autograd.grad(functional.attend(call, backend), inputs, grad_out)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradients_are_bitwise_equal(self, backend, device):
        """All regions choose region 0, whose gradients atomics would add in a changing order."""
        interpreted = backend == "triton" and device.type == "cpu"
        case = CASES_BY_NAME["tokens_5x5" if interpreted else "biformer_stage2"]
        qkv = random_map(case, device).float()
        qkv[..., : case.dim] = qkv[..., : case.dim].abs()
        qkv[:, :4, :4, case.dim : 2 * case.dim] += 5  # region 0's keys
        weight = torch.randn(case.dim, 1, 3, 3, device=device)
        grad_out = torch.randn(*qkv.shape[:3], case.dim, device=device)
        _, r_idx = functional.region_routing(qkv, n_win=case.n_win, topk=case.topk, backend=backend)
        assert (r_idx[..., 0] == 0).all()

        first, second = (self._gradients(qkv, weight, case.spec, grad_out, backend) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_control_another_order_of_addition_gives_other_bits(self, device):
        terms = torch.randn(1000, 64, device=device) * torch.logspace(-3, 3, 1000, device=device)[:, None]
        index = torch.zeros(1000, dtype=torch.int64, device=device)
        forwards, backwards = (
            torch.zeros(1, 64, device=device).index_add(0, index, t) for t in (terms, terms.flip(0))
        )
        assert not torch.equal(forwards, backwards)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.filterwarnings("error::UserWarning")  # the class of PyTorch's warnings
    def test_deterministic_mode_neither_raises_nor_warns(self, backend, device):
        """By default Ultralytics trains in PyTorch's deterministic mode."""
        module = BiLevelRoutingAttention(32, 1, 2, topk=2, auto_pad=True, backend=backend).to(device)
        torch.use_deterministic_algorithms(True)
        try:
            module(torch.randn(2, 9, 9, 32, device=device)).square().mean().backward()
        finally:
            torch.use_deterministic_algorithms(False)


def test_images_that_the_torch_backend_gathers_in_parts_are_as_each_alone(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)  # a part for each image
    monkeypatch.setattr(masked, "MOST_MASKED", 0)
    module, x = BiLevelRoutingAttention(16, 2, 2, topk=2, backend="torch"), torch.randn(3, 8, 8, 16)
    alone = torch.cat([module(image[None]) for image in x])
    assert relative_error(module(x), alone) < 1e-6  # float32; only the projections differ


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_routing_alone_learns_only_with_diff_routing(backend):
    qkv = torch.randn(1, 4, 4, 24, requires_grad=True)
    for learns in (False, True):
        r_weight, _ = functional.region_routing(qkv, n_win=2, topk=2, diff_routing=learns, backend=backend)
        assert r_weight.requires_grad == learns
