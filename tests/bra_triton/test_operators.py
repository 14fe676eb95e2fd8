"""What PyTorch's dispatcher sees: the operators' fake implementations, and which operators touch the map."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import INTERPRETED
from operator_calls import BRANCHES, OPERATORS, Calls, attend, attend_regional, route
from planned import poisoned
from problems import Case, random_map
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional
from bra_triton.backend.kernels import fused_kernels
from bra_triton.bench import in_tree
from bra_triton.kernels.forms import ROUTED, use_form
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Needs, PackedAttention

BACKENDS = ("torch", "triton")
CASE = Case("operators", "four regions of 3 x 4 tokens: the interpreter is slow", 6, 8, 32, 2, 2, 2, 16)


def _layout(result):
    """Shape, strides and dtype of every tensor."""
    return [(tuple(x.shape), x.stride(), x.dtype) for x in tree_leaves(result)]


def _compare_with_fake(function, arguments, result):
    with FakeTensorMode() as fake:
        fakes = tree_map_only(torch.Tensor, fake.from_tensor, arguments)
        assert _layout(function(*fakes)) == _layout(result), function


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
class TestFakes:
    """Fake implementations give the real layouts: compilers allocate and read memory by them."""

    @pytest.mark.parametrize("branch", BRANCHES)
    def test_attention(self, branch, backend, batch, device):
        if batch == 2 and backend == "triton" and INTERPRETED and branch not in ("plain", "everything"):
            pytest.skip("the interpreter is slow, and strides of one image tell more")
        with Calls(_compare_with_fake) as calls:
            attend(branch, backend, batch, device)
        assert {"bra_triton::attend", "bra_triton::attend_backward"} <= calls.names

    def test_routing(self, backend, batch, device):
        with Calls(_compare_with_fake) as calls:
            route(backend, batch, device)
        assert {"bra_triton::route_backward", "bra_triton::region_means_backward"} <= calls.names

    def test_attention_over_given_regions(self, backend, batch, device):
        with Calls(_compare_with_fake) as calls:
            attend_regional(backend, batch, device)
        assert calls.names == {"bra_triton::attend_regional", "bra_triton::attend_regional_backward"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_meet_pytorchs_own_checks(backend, device):
    """Schema, fake implementation, autograd registration and AOT dispatch with dynamic shapes."""
    calls = {}
    with Calls(lambda function, arguments, _: calls.update({function: arguments})) as log:
        attend("everything", backend, 1, device)
        route(backend, 1, device)
        attend_regional(backend, 1, device)
    assert log.names == OPERATORS
    for function, arguments in calls.items():
        learns = not function.overloadpacket.__name__.endswith("_backward")
        arguments = tree_map_only(
            torch.Tensor,
            lambda x, learns=learns: x.detach().requires_grad_(learns and x.is_floating_point()),
            arguments,
        )
        # Dispatch is the same for both backends, and the interpreter is slow.
        checks = ("test_schema", "test_faketensor") if backend == "triton" else DEFAULT_TEST_UTILS
        # The tensor that the Triton backend saves has gaps between its arrays, which no kernel writes.
        # `poisoned` fills them alike in every run, so that opcheck can compare runs.
        with poisoned():
            torch.library.opcheck(function, arguments, test_utils=checks)


class _Log(TorchDispatchMode):
    """Names of the operators that touch a tensor of at least `elements` elements.

    Operators that Triton's interpreter calls are left out: it copies every argument to emulate a launch.
    """

    def __init__(self, elements):
        super().__init__()
        self.elements = elements
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # These use their argument only for its dtype and device.
        of_its_kind = function.overloadpacket in (torch.ops.aten.new_zeros, torch.ops.aten.new_empty)
        tensors = [x for x in tree_leaves(result if of_its_kind else (args, result)) if torch.is_tensor(x)]
        if any(x.numel() >= self.elements for x in tensors) and not _called_by_the_interpreter():
            self.names.append(function.overloadpacket._qualified_op_name)
        return result


def _called_by_the_interpreter():
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            return True
        frame = frame.f_back
    return False


# The map is larger than any weight, so that only operators that touch the map are logged.
MAP_CASE = Case("map", "", 12, 15, 16, 1, 3, 3)
# All operators that a forward and a backward may call on a tensor as large as the map. Others fail the test:
# gather, index, cat, pad, permuted copies (clone, copy_, contiguous), zero-filled projections.
ALLOWED = {
    *("bra_triton::attend", "bra_triton::attend_backward"),
    *("aten::addmm", "aten::mm", "aten::sum", "aten::mul", "aten::ones_like"),  # projections, loss
    *("aten::convolution", "aten::convolution_backward"),  # projections of NCHW maps
    *("aten::view", "aten::_unsafe_view", "aten::t", "aten::detach", "aten::expand"),  # no copy
    *("aten::permute", "aten::sym_size", "aten::squeeze", "aten::unsqueeze"),
}


@pytest.mark.parametrize("size", [(12, 15), (11, 13)], ids=["divisible", "padded"])
@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_forward_and_backward_of_the_module_touch_the_map_only_by_allowed_operators(kind, size, device):
    """Neither the padding of a map nor the packed gradient of an NCHW map's projection may cost a copy."""
    case = MAP_CASE
    module = kind(case.dim, case.num_heads, case.n_win, topk=case.topk, auto_pad=True, backend="triton")
    module.to(device)
    x = torch.randn(1, *size, case.dim, device=device)
    x = x.permute(0, 3, 1, 2) if kind is NCHWBiLevelRoutingAttention else x
    x.requires_grad_()
    with _Log(x.numel()) as log:
        module(x).sum().backward()
    assert "bra_triton::attend_backward" in log.names
    assert set(log.names) <= ALLOWED, set(log.names) - ALLOWED


def test_inside_the_operators_nothing_but_allocations_touches_the_map(device):
    """A log of the module's call cannot see inside an operator, so this test logs the implementation."""
    case = MAP_CASE
    spec, qkv = case.spec, random_map(case, device).float()
    weight = torch.randn(case.dim, 1, 3, 3, device=device)
    grad_out = torch.randn(*qkv.shape[:3], case.dim, device=device)
    settings = spec.settings(RegionGrid.of_windows(case.height, case.width, case.n_win))
    problem = PackedAttention(qkv, None, None, None, weight, None, settings)
    kernels = fused_kernels("triton")
    with _Log(grad_out.numel()) as log:
        _, saved = kernels.attend(problem, trains=True)
        kernels.attend_backward(grad_out, problem, None, saved, Needs(lepe_weight=True))
    # `set_` makes the arrays inside one allocation, which the interpreter needs as tensors.
    allowed = {"aten::empty_strided", "aten::set_"}
    assert set(log.names) <= allowed, set(log.names) - allowed
    assert "aten::empty_strided" in log.names


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
@pytest.mark.parametrize("topk", [8, 9])
def test_where_every_region_attends_to_all_nothing_is_routed(kind, topk, device, monkeypatch):
    case = MAP_CASE
    module = kind(case.dim, case.num_heads, case.n_win, topk=topk, backend="triton").to(device)
    x = torch.randn(1, case.height, case.width, case.dim, device=device)
    launched, run = [], Plan.run

    def log(plan, *inputs):
        launched.extend(launch.name for launch in plan.launches)
        return run(plan, *inputs)

    monkeypatch.setattr(Plan, "run", log)
    with use_form(ROUTED):  # else the launch of the attention routes small maps
        module(x.permute(0, 3, 1, 2) if kind is NCHWBiLevelRoutingAttention else x)
    assert launched
    assert ("route_kernel" in launched) == (topk < 9)


def test_control_the_log_sees_the_reference_gather(device):
    case = MAP_CASE
    module = BiLevelRoutingAttention(
        case.dim, case.num_heads, case.n_win, topk=case.topk, backend="reference"
    ).to(device)
    with _Log(case.height * case.width * case.dim) as log:
        module(torch.randn(1, case.height, case.width, case.dim, device=device)).sum().backward()
    assert {"aten::index", "aten::clone"} <= set(log.names)


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
    """Each setting in a new process: PyTorch refuses to go back from its newer settings to the older ones."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(in_tree.__file__).parent)!r})
import in_tree
in_tree.install()  # where the package is not installed
sys.path.pop(0)
import torch
from bra_triton.kernels.lib import precision
newer = [  # than PyTorch 2.8
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
]
for setting in (
    *(newer if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ()),
    "torch.set_float32_matmul_precision('high')",
):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, setting
        continue
    assert precision.dot_precision(torch.float32) == "tf32x3"
    exec(setting)
    assert precision.dot_precision(torch.float32) == "tf32"
    assert precision.dot_precision(torch.float16) == "ieee"
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
