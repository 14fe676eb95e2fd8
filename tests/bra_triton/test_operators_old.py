"""What PyTorch's compiler, dispatcher, autocast and exporters see."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from problems import Case, random_map, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from bra_triton import (
    BiLevelRoutingAttention,
    NCHWBiLevelRoutingAttention,
    downsampling,
    functional,
    reference,
)
from bra_triton.backend import registry
from bra_triton.bench import in_tree
from bra_triton.kernels.grid import RegionGrid
from bra_triton.operators import attention as operators
from bra_triton.spec import AttentionSpec

BACKENDS = ("torch", "triton")
CASE = Case("operators", "four regions of 3 x 4 tokens: the interpreter is slow", 6, 8, 32, 2, 2, 2, 16)


def _operator_arguments(device, backend, lepe=True, mode="none"):
    """Arguments of `routed_attention`; a mode other than "none" has padding and its own keys, too."""
    spec = CASE.spec
    plain = mode == "none"
    qkv = random_map(CASE, device).float()[:, : None if plain else -1].contiguous()

    def random(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    kv = None if plain else random(1, 2 * spec.n_win, 2 * spec.n_win, spec.qk_dim + spec.dim)
    padding = None if plain else random(spec.packed_dim)
    r_weight, r_idx = functional.region_routing(
        qkv, n_win=spec.n_win, topk=spec.topk, qk_dim=spec.qk_dim, padding=padding, backend=backend
    )
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    return (
        *(qkv.requires_grad_(), kv, padding, r_idx.int()),
        None if plain else r_weight.detach().requires_grad_(),
        *((random(spec.dim, 1, 3, 3), random(spec.dim)) if lepe else (None, None)),
        *(spec.qk_dim, spec.num_heads, grid.numbers, spec.scale, mode, True, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lepe", "mode"), [(True, "none"), (False, "hard"), (True, "soft")])
def test_operators_meet_pytorchs_own_checks(backend, lepe, mode, device):
    """Schema, fake implementation, autograd registration and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(operators.routed_attention, _operator_arguments(device, backend, lepe, mode))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_without_recompiling_for_a_seen_size(backend, device):
    module = BiLevelRoutingAttention(32, 1, 2, topk=2, auto_pad=True, backend=backend).to(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in (8, 9, 8):
        x = torch.randn(1, size, size, 32, device=device, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        actual, expected = compiled(x), module(y)
        actual.sum().backward()
        expected.sum().backward()
        assert torch.allclose(actual, expected, atol=1e-5)
        assert torch.allclose(x.grad, y.grad, atol=1e-5)
    assert counter.frame_count <= 2


class _Log(TorchDispatchMode):
    """Names of the operators that touch a tensor of at least `elements` elements.

    What Triton's interpreter does to emulate a launch (it copies every argument) is not the package's doing.
    """

    def __init__(self, elements):
        super().__init__()
        self.elements = elements
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        if any(t.numel() >= self.elements for t in tensors) and not _called_by_the_interpreter():
            self.names.append(function.overloadpacket._qualified_op_name)
        return result


def _called_by_the_interpreter():
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            return True
        frame = frame.f_back
    return False


# The map is larger than any weight, so that only what touches it is logged.
MAP_CASE = Case("map", "", 12, 15, 16, 1, 3, 3)
# Everything that a forward and a backward may do with a tensor as large as the map. What is not here,
# gather, index, cat, pad, permuted copies (clone, copy_, contiguous), zero-filled projections, fails.
ALLOWED = {
    *("bra_triton::region_means", "bra_triton::routed_attention", "bra_triton::routed_attention_backward"),
    *("aten::addmm", "aten::mm", "aten::sum", "aten::mul", "aten::ones_like"),  # projections, loss
    *("aten::convolution", "aten::convolution_backward"),  # projections of NCHW maps
    *("aten::view", "aten::_unsafe_view", "aten::t", "aten::detach", "aten::expand"),  # no memory moves
    *("aten::permute", "aten::sym_size"),
}


@pytest.mark.parametrize("size", [(12, 15), (11, 13)], ids=["divisible", "padded"])
@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_forward_and_backward_of_the_module_touch_the_map_only_by_allowed_operators(kind, size, device):
    """Padding a map must not copy it either, nor need the one gradient of an NCHW map's projection."""
    case = MAP_CASE
    module = kind(case.dim, case.num_heads, case.n_win, topk=case.topk, auto_pad=True, backend="triton")
    module.to(device)
    x = torch.randn(1, *size, case.dim, device=device)
    x = x.permute(0, 3, 1, 2) if kind is NCHWBiLevelRoutingAttention else x
    x.requires_grad_()
    with _Log(x.numel()) as log:
        module(x).sum().backward()
    assert "bra_triton::routed_attention_backward" in log.names
    assert set(log.names) <= ALLOWED, set(log.names) - ALLOWED


def test_inside_the_operators_nothing_but_allocations_touches_the_map(device):
    """The log of the module cannot see into an operator, so its implementation is logged on its own."""
    case = MAP_CASE
    spec, qkv = case.spec, random_map(case, device).float()
    weight = torch.randn(case.dim, 1, 3, 3, device=device)
    grad_out = torch.randn(*qkv.shape[:3], case.dim, device=device)
    grid = RegionGrid.of_windows(case.height, case.width, case.n_win)
    numbers = (spec.qk_dim, spec.num_heads, grid.numbers, spec.scale, "none")
    with _Log(grad_out.numel()) as log:
        means = registry.load("triton").region_means(qkv, None, grid, 2 * spec.qk_dim)
        _, r_idx = registry.load("triton").route(*means.split(spec.qk_dim, -1), spec.topk, spec.scale)
        inputs = (qkv, None, None, r_idx, None, weight, None)
        _, attention, lse = operators.routed_attention.__wrapped__(*inputs, *numbers, True, "triton")
        operators.routed_attention_backward.__wrapped__(
            grad_out, *inputs, attention, lse, False, True, *numbers, "triton"
        )
    allowed = {
        *("aten::new_empty", "aten::empty_like"),
        *("aten::slice", "aten::split_with_sizes", "aten::unsqueeze", "aten::detach"),  # views
    }
    assert set(log.names) <= allowed, set(log.names) - allowed


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
@pytest.mark.parametrize("topk", [8, 9])
def test_where_every_region_attends_to_all_nothing_is_routed(kind, topk, device):
    case = MAP_CASE
    module = kind(case.dim, case.num_heads, case.n_win, topk=topk, backend="triton").to(device)
    x = torch.randn(1, case.height, case.width, case.dim, device=device)
    with _Log(0) as log:
        module(x.permute(0, 3, 1, 2) if kind is NCHWBiLevelRoutingAttention else x)
    assert ("bra_triton::route" in log.names) == ("bra_triton::region_means" in log.names) == (topk < 9)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused_not_zero(backend, device):
    """A gradient that could be differentiated again may be asked for; only then it raises."""
    module = BiLevelRoutingAttention(
        32, 1, 2, topk=2, soft_routing=True, diff_routing=True, backend=backend
    ).to(device)
    x = torch.randn(1, 4, 4, 32, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match="no second derivatives; backend='reference' has"):
        torch.autograd.grad(first.square().sum(), x)


def test_operators_called_where_dynamo_watches_but_does_not_compile():
    """After a break in a `try` Dynamo runs the frame as it is, and sees what the operators do inside."""
    module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend="torch")

    def attend(x):
        x = x * 2
        torch._dynamo.graph_break()
        try:
            x = module(x)
            torch._dynamo.graph_break()
        finally:
            pass
        return x.sin()

    x = torch.randn(2, 8, 8, 32, requires_grad=True)
    expected, actual = attend(x), torch.compile(attend, backend="eager")(x)
    assert relative_error(actual, expected.double()) < 1e-6
    assert (
        relative_error(*(torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected.double()))) < 1e-6
    )


def test_control_the_log_sees_the_reference_gather(device):
    case = MAP_CASE
    module = reference.BiLevelRoutingAttention(case.dim, case.num_heads, case.n_win, topk=case.topk)
    with _Log(case.height * case.width * case.dim) as log:
        module.to(device)(torch.randn(1, case.height, case.width, case.dim, device=device)).sum().backward()
    assert {"aten::index", "aten::clone"} <= set(log.names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_half_precision(backend, device):
    module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend=backend).to(device)
    x = torch.randn(1, 8, 8, 32, device=device, requires_grad=True)
    expected = module(x.detach())
    with torch.autocast(device.type, torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == module.lepe.weight.grad.dtype == torch.float32
    # bfloat16 keeps 8 bits; three roundings on the way.
    assert relative_error(out, expected.double()) < 3e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_into_the_operators(backend, device):
    qkv = random_map(CASE, device).float()
    options = {"n_win": CASE.n_win, "topk": CASE.topk, "qk_dim": CASE.qk_dim, "backend": backend}
    expected = functional.region_routing(qkv, **options)
    with torch.autocast(device.type, torch.bfloat16):
        actual = functional.region_routing(qkv, **options)
    assert actual[0].dtype == torch.float32
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_every_way_to_allow_tf32_is_understood():
    """In processes of their own, since PyTorch refuses to go back from the newer settings to the older."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(in_tree.__file__).parent)!r})
import in_tree
in_tree.install()  # where the package is not installed
sys.path.pop(0)
import torch
from bra_triton.kernels.attention import launch as attention
for setting in (
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('high')",
):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, setting
        continue
    assert attention._dot_precision(torch.float32) == "tf32x3"
    exec(setting)
    assert attention._dot_precision(torch.float32) == "tf32"
    assert attention._dot_precision(torch.float16) == "ieee"
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradcheck_of_the_torch_backend():
    """Numeric derivatives in float64; routing is piecewise constant, so the small step does not cross it."""
    spec = AttentionSpec(dim=4, qk_dim=2, num_heads=1, n_win=2, topk=2)
    qkv = torch.randn(1, 4, 4, spec.packed_dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def attend(qkv, weight, bias):
        return functional.attend(qkv, spec, functional.Parts(weight, bias))

    torch.autograd.gradcheck(attend, (qkv, weight, bias))


@pytest.mark.parametrize("soft_routing", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("mode", ["identity", *downsampling.MODES[1:]])
def test_gradcheck_of_every_mode_on_the_torch_backend(mode, soft_routing):
    """Padding, router and down-sampling together. Hard routing's gradient is no derivative of its forward:
    there the output is checked with the router detached."""
    torch.manual_seed(1)
    spec = AttentionSpec(4, 2, 1, 2, 2, soft_routing=soft_routing, diff_routing=soft_routing)
    down = downsampling.build(mode, 2, 4, kv_per_win=1, ratio=2).double().eval()
    inputs = {
        "qkv": torch.randn(1, 3, 4, spec.packed_dim),
        "padding": torch.randn(spec.packed_dim),
        "router_weight": torch.eye(2) if soft_routing else None,
        "router_bias": torch.randn(2) if soft_routing else None,
    }
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items() if x is not None}

    def attend(qkv, *small):
        parts = dict(zip(list(inputs)[1:], small, strict=True))
        kv_down = None if mode == "identity" else down
        return functional.attend(
            qkv, spec, functional.Parts(**parts, kv_downsampling=kv_down), backend="torch"
        )

    torch.autograd.gradcheck(attend, tuple(inputs.values()))


class TestExport:
    """Exported graphs hold plain PyTorch operators alone and compute the same."""

    @staticmethod
    def _module():
        return BiLevelRoutingAttention(32, 2, 3, qk_dim=16, topk=4, auto_pad=True).eval()

    def test_torchscript_trace(self):
        module, x = self._module(), torch.randn(1, 10, 12, 32)
        traced = torch.jit.trace(module, x)
        assert "bra_triton::" not in str(traced.inlined_graph)
        y = torch.randn(1, 10, 12, 32)
        assert relative_error(traced(y), module(y).double()) < 1e-5

    @pytest.mark.parametrize("size", [(9, 12), (10, 12)], ids=["divisible", "padded"])
    def test_traced_graph_serves_other_sizes(self, size):
        """Whether the traced size needs padding must not be baked in."""
        module = self._module()
        traced = torch.jit.trace(module, torch.randn(1, *size, 32), check_trace=False)
        for height, width in ((9, 12), (10, 12), (8, 17)):
            y = torch.randn(1, height, width, 32)
            assert relative_error(traced(y), module(y).double()) < 1e-5

    def test_torch_export(self):
        module, x = self._module(), torch.randn(1, 10, 12, 32)
        program = torch.export.export(module, (x,))
        assert "bra_triton::" not in str(program.graph)
        assert relative_error(program.module()(x), module(x).double()) < 1e-5
