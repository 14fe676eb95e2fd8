"""The NCHW drop-in on the fused backends, against the float64 reference."""

import inspect

import pytest
import torch
from modules import reference_of, run
from problems import relative_error, worst

import bra_triton
from bra_triton import NCHWBiLevelRoutingAttention, reference
from bra_triton.call import Call
from bra_triton.kernels.grid import RegionGrid
from bra_triton.operators import routing as operators
from bra_triton.spec import AttentionSpec

BACKENDS = ("torch", "triton")
# As in test_regional.
FLOAT32_TOLERANCE = 1e-5
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
def test_half_precision_routes_as_its_float32_values(backend, device):
    """Means of bfloat16 tokens rounded to bfloat16 would choose other regions; so would autocast."""
    grid = RegionGrid.of_region_size(16, 16, (2, 2))
    spec = AttentionSpec(32, 32, 1, n_win=8, topk=8, router_scale=1.0, counts_padding=False)
    qkv = torch.randn(1, 16, 16, 96, device=device).bfloat16()
    _, expected = reference.route(Call(qkv.float(), spec))
    query, key, _ = qkv.permute(0, 3, 1, 2).chunk(3, 1)
    rounded = [torch.nn.functional.avg_pool2d(x, 2).flatten(2) for x in (query, key)]
    assert not torch.equal((rounded[0].transpose(1, 2) @ rounded[1]).topk(8).indices, expected)
    with torch.autocast(device.type, torch.bfloat16):
        means = operators.region_means(qkv, None, 32, grid.numbers, backend)
        assert torch.equal(operators.route(*means.split(32, -1), 8, 1.0, backend)[1].long(), expected)


def _pair(backend, device, dim=16, num_heads=2, n_win=3, **arguments):
    """The drop-in in float32 and the reference in float64, with the same weights."""
    module = NCHWBiLevelRoutingAttention(dim, num_heads, n_win, **arguments, backend=backend).to(device)
    return module, reference_of(module)


MODULE_CASES = {
    "divisible": ((6, 9), {}),
    "padded": ((7, 8), {"topk": 3}),
    "one-token regions": ((5, 4), {"side_dwconv": 5, "qk_scale": 0.4}),
    "negative scale": ((7, 8), {"qk_scale": -0.4}),
    "no LePE, dense": ((6, 6), {"side_dwconv": 0, "topk": 9}),
    "low map": ((2, 7), {"auto_pad": True}),
    "fewer regions than topk": ((1, 2), {"auto_pad": True}),
    # The strides of a map of one token do not tell the stride between images.
    "one token": ((1, 1), {"auto_pad": True}),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class TestModule:
    @pytest.mark.parametrize(
        ("name", "layout", "backend"),
        [
            *((name, layout, "torch") for name in MODULE_CASES for layout in LAYOUTS),
            *((name, "channels_last", "triton") for name in ("divisible", "padded", "one token")),
            ("fewer regions than topk", "channels_last", "triton"),
        ],
    )
    def test_float32_matches_the_float64_reference(self, name, layout, backend, device):
        size, arguments = MODULE_CASES[name]
        module, oracle = _pair(backend, device, **arguments)
        x = torch.randn(2, 16, *size, device=device)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        grad_out = torch.randn(2, 16, *size, dtype=torch.float64, device=device)
        actual, expected = run(module, x, grad_out), run(oracle, x.double(), grad_out)
        assert actual["out"].is_contiguous(memory_format=torch.channels_last)
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert max(errors.values()) < FLOAT32_TOLERANCE, errors

    def test_float64_is_the_references(self, device):
        module, oracle = _pair("torch", device)
        x = torch.randn(2, 16, 7, 8, dtype=torch.float64, device=device)
        expected = run(oracle, x, x)
        assert worst(relative_error(a, expected[k]) for k, a in run(module.double(), x, x).items()) < 1e-12

    @every_backend
    def test_an_empty_batch_and_its_gradients(self, backend, device):
        module, _ = _pair(backend, device)
        results = run(module, torch.randn(0, 16, 7, 8, device=device), torch.randn(0, 16, 7, 8))
        assert results["out"].shape == results["x"].shape == (0, 16, 7, 8)
        assert not results["qkv_linear.weight"].any()

    def test_takes_the_originals_arguments_in_its_order(self):
        parameters = inspect.signature(bra_triton.nchwBRA).parameters
        assert list(parameters) == [
            *(
                "dim",
                "num_heads",
                "n_win",
                "qk_scale",
                "topk",
                "side_dwconv",
                "auto_pad",
                "attn_backend",
                "backend",
            )
        ]
        defaults = [p.default for p in parameters.values()][1:7]
        assert defaults == [8, 7, None, 4, 3, False]
        assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
        module = bra_triton.nchwBRA(16, 2, 5, 0.25, 3, 5, True, "torch")
        assert (module.spec.num_heads, module.spec.n_win, module.spec.topk) == (2, 5, 3)
        assert (module.spec.scale, module.lepe.kernel_size, module.auto_pad) == (0.25, (5, 5), True)

    def test_the_originals_backend_argument(self):
        assert NCHWBiLevelRoutingAttention(16).backend == "auto"
        for name in ("torch", "triton"):
            assert NCHWBiLevelRoutingAttention(16, attn_backend=name).backend == name
            assert NCHWBiLevelRoutingAttention(16, attn_backend=name, backend=name).backend == name
        with pytest.raises(
            ValueError, match=r"attn_backend must be one of \('torch', 'triton'\), got 'cuda'"
        ):
            NCHWBiLevelRoutingAttention(16, attn_backend="cuda")
        with pytest.raises(ValueError, match="attn_backend='torch' contradicts backend='triton'"):
            NCHWBiLevelRoutingAttention(16, attn_backend="torch", backend="triton")

    def test_an_unknown_backend_is_refused_at_once(self):
        with pytest.raises(ValueError, match="backend must be one of"):
            NCHWBiLevelRoutingAttention(16, backend="cuda")
        with pytest.raises(ValueError, match="backend must be one of"):
            NCHWBiLevelRoutingAttention(16).backend = "cuda"

    def test_a_projection_of_larger_side_is_called(self):
        """Only convolutions of 1 x 1 are matrix products."""
        module = NCHWBiLevelRoutingAttention(8, 2, 2, topk=2, backend="torch")
        module.qkv_linear = torch.nn.Conv2d(8, 24, 3, padding=1)
        x = torch.randn(1, 8, 4, 4)
        expected = module.qkv_linear(x).permute(0, 2, 3, 1)
        assert relative_error(module.call_of(x).qkv, expected) < FLOAT32_TOLERANCE

    def test_attention_matrix_is_the_references(self):
        module, oracle = _pair("torch", torch.device("cpu"))
        x = torch.randn(1, 16, 7, 8)
        out, attn_weight = module(x, ret_attn_mask=True)
        expected, expected_weight = oracle(x.double(), ret_attn_mask=True)
        assert relative_error(out, expected) < FLOAT32_TOLERANCE
        assert relative_error(attn_weight, expected_weight) < FLOAT32_TOLERANCE
        assert relative_error(module(x), expected) < FLOAT32_TOLERANCE

    @every_backend
    def test_autocast_runs_in_half_precision(self, backend, device):
        module, _ = _pair(backend, device)
        x = torch.randn(1, 16, 7, 8, device=device, requires_grad=True)
        expected = module(x.detach())
        with torch.autocast(device.type, torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert x.grad.dtype == module.lepe.weight.grad.dtype == torch.float32
        # bfloat16 keeps 8 bits; results are rounded three times.
        assert relative_error(out, expected.double()) < 3e-2
