"""What training loops do with a module: checkpoint, offload, differentiate twice, copy, pickle, autocast."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from modules import reference_of, run
from operator_calls import Calls
from problems import relative_error, worst
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.backend.kernels import fused_kernels
from bra_triton.kernels import overrides
from bra_triton.kernels.forms import ROUTED, use_form

BACKENDS = ("torch", "triton")
# Arguments with which a forward saves all that it can: for LePE, padding, the router's layer, reduced keys.
EVERYTHING = {
    **{"soft_routing": True, "diff_routing": True, "param_routing": True},
    **{"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2},
}
MODULES = {
    "NHWC": lambda backend: BiLevelRoutingAttention(8, 1, 2, topk=2, auto_pad=True, backend=backend),
    "everything": lambda backend: BiLevelRoutingAttention(
        8, 1, 2, topk=2, auto_pad=True, **EVERYTHING, backend=backend
    ),
    "NCHW": lambda backend: NCHWBiLevelRoutingAttention(8, 1, 2, topk=2, backend=backend),
}
# The interpreter is slow: where both backends behave alike, it runs only the module that saves most.
MOST = [*((name, "torch") for name in MODULES), ("everything", "triton")]
every_module = pytest.mark.parametrize("name", MODULES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _problem(name, backend, device):
    """A module, a map that it pads, and a gradient of the output."""
    x, grad_out = torch.randn(2, 1, 3, 4, 8, device=device)
    if name == "NCHW":
        x, grad_out = x.permute(0, 3, 1, 2), grad_out.permute(0, 3, 1, 2)
    return MODULES[name](backend).to(device), x, grad_out


def _gradients(module, out, x, grad_out, **options):
    return torch.autograd.grad(out, (x, *module.parameters()), grad_out, **options)


def _save_attention(context, operator, *arguments, **options):
    saved = operator is torch.ops.bra_triton.attend.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class _Stored:
    """A copy of a saved tensor, which can be restored for every backward."""

    def __init__(self, x):
        self.x = x.clone()

    def restored(self):
        return self.x.clone()


def _through(way, module, x):
    if way == "saved on the CPU":
        with save_on_cpu():
            return module(x)
    if way == "saved by hooks":
        with saved_tensors_hooks(_Stored, _Stored.restored):
            return module(x)
    contexts = {}
    if way == "selective checkpoint":
        contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(_save_attention)}
    return checkpoint(module, x, use_reentrant=way == "reentrant checkpoint", **contexts)


@pytest.mark.parametrize(("name", "backend"), [*MOST, ("NCHW", "triton")])
def test_whatever_becomes_of_saved_tensors_the_gradients_are_the_same(name, backend, device):
    module, x, grad_out = _problem(name, backend, device)
    expected = run(module, x, grad_out)
    for way in (
        *("checkpoint", "reentrant checkpoint", "selective checkpoint"),
        *("saved on the CPU", "saved by hooks"),
    ):
        actual = run(module, x, grad_out, lambda x, way=way: _through(way, module, x))
        differ = [key for key in expected if not torch.equal(actual[key], expected[key])]
        assert not differ, way


def test_a_selective_checkpoint_recomputes_no_attention(device):
    module, x, grad_out = _problem("NHWC", "torch", device)
    counts = {}
    for way in ("checkpoint", "selective checkpoint"):
        attended = []
        with Calls(lambda function, *_, attended=attended: attended.append(function)):
            run(module, x, grad_out, lambda x, way=way: _through(way, module, x))
        counts[way] = attended.count(torch.ops.bra_triton.attend.default)
    assert counts["selective checkpoint"] < counts["checkpoint"]


@pytest.mark.parametrize(("name", "backend"), MOST)
def test_a_kept_graph_gives_the_same_gradients_twice(name, backend, device):
    module, x, grad_out = _problem(name, backend, device)
    out = module(x.requires_grad_())
    first = _gradients(module, out, x, grad_out, retain_graph=True)
    second = _gradients(module, out, x, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        _gradients(module, out, x, grad_out)


@pytest.mark.parametrize(("name", "backend"), MOST)
def test_no_setting_of_the_process_is_touched(name, backend, device, monkeypatch):
    """Another thread would see a changed setting, and might later restore the changed value."""
    touched = []
    monkeypatch.setattr(torch.backends.ContextProp, "__set__", lambda self, _, value: touched.append(value))
    for setter in dir(torch._C):
        if setter.startswith(("_set_cudnn", "_set_cublas", "_set_deterministic", "_set_sdp", "_set_fp32")):
            monkeypatch.setattr(torch._C, setter, lambda *value: touched.append(value))
    module, x, grad_out = _problem(name, backend, device)
    run(module, x, grad_out)
    assert not touched


@every_module
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_no_tensor_is_made_with_the_defaults_of_the_process(name, backend, device):
    """`torch.set_default_device("cuda")` stands in many scripts, also where a model is on the CPU."""
    module, x, grad_out = _problem(name, backend, device)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = run(module, x, grad_out)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = run(module, x, grad_out)  # the second, so that it makes no tensor that is kept for the first
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@every_module
@every_backend
@pytest.mark.parametrize("path", ["eager", "operators"])
def test_a_second_derivative_is_refused_not_zero(path, name, backend, device):
    """`create_graph=True` is allowed; differentiating the gradient raises."""
    module, x, grad_out = _problem(name, backend, device)
    expected = run(module, x, grad_out)["x"]

    def twice():
        x.requires_grad_()
        (first,) = torch.autograd.grad(module(x), x, grad_out, create_graph=True)
        assert torch.equal(first, expected)
        with pytest.raises(RuntimeError, match="no second derivatives; use backend='reference'"):
            torch.autograd.grad(first.square().sum(), x)

    if path == "eager":
        twice()
        return
    with Calls(lambda *_: None) as calls:
        twice()
    assert "bra_triton::attend_backward" in calls.names


@every_module
@every_backend
def test_a_dispatch_mode_sees_the_operators_and_changes_nothing(name, backend, device):
    module, x, grad_out = _problem(name, backend, device)
    expected = run(module, x, grad_out)
    with Calls(lambda *_: None) as calls:
        actual = run(module, x, grad_out)
    assert {"bra_triton::attend", "bra_triton::attend_backward"} <= calls.names
    differ = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert not differ


def test_a_flop_counter_sees_the_attention(device):
    module, x, _ = _problem("NHWC", "torch", device)
    seen = []
    formula = {torch.ops.bra_triton.attend: lambda *shapes, **_: seen.append(shapes) or 1000}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        module(x)
    assert len(seen) == 1
    assert counter.get_flop_counts()["Global"][torch.ops.bra_triton.attend] == 1000


@every_module
def test_a_parameter_that_is_not_frozen_gets_its_gradient(name):
    module, x, grad_out = _problem(name, "torch", "cpu")
    given = dict(module.named_parameters())
    expected = torch.autograd.grad(module(x), given.values(), grad_out)
    for (learning, parameter), gradient in zip(given.items(), expected, strict=True):
        module.requires_grad_(False)
        parameter.requires_grad_()
        (actual,) = torch.autograd.grad(module(x), parameter, grad_out)
        assert torch.equal(actual, gradient), learning


def test_a_backward_computes_with_what_was_set_for_the_forward(monkeypatch):
    """Autograd runs the backward of a GPU in a thread of its own, in which nothing is set."""
    kernels, found = fused_kernels("torch"), []
    backward = kernels.attend_backward
    monkeypatch.setattr(
        kernels, "attend_backward", lambda *given: found.append(overrides.in_force()) or backward(*given)
    )
    module, x, _ = _problem("NHWC", "torch", "cpu")
    with use_form(ROUTED):
        out = module(x)
    out.sum().backward()
    assert [each.form for each in found] == [ROUTED]


class _Stopped(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("seen", [False, True], ids=["eager", "operators"])
def test_an_output_without_a_gradient_gives_none(seen):
    module, x, _ = _problem("NHWC", "torch", "cpu")
    with FlopCounterMode(display=False) if seen else nullcontext():
        _Stopped.apply(module(x)).sum().backward()
    assert all(value.grad is None or not value.grad.any() for value in module.parameters())


@every_module
@every_backend
def test_transforms_of_functions_are_right_or_refused(name, backend, device):
    """`torch.func` cannot transform the `autograd.Function` of eager calls; nothing may be silently wrong."""
    module, x, grad_out = _problem(name, backend, device)
    expected = run(module, x, grad_out)
    try:
        actual = torch.func.grad(lambda x: (module(x) * grad_out).sum())(x)
    except RuntimeError:
        pass
    else:
        assert relative_error(actual, expected["x"].double()) < 1e-5
    try:
        actual = torch.func.vmap(module)(torch.stack((x, x.flip(0))))
    except RuntimeError:
        pass
    else:
        assert relative_error(actual[0], expected["out"].double()) < 1e-5


def _saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved_and_loaded,
}


@pytest.mark.parametrize(
    ("name", "backend", "copied"),
    [*((name, "torch", copied) for name in MODULES for copied in COPIES), ("NHWC", "triton", "pickle")],
)
def test_copies_before_and_after_a_step_are_the_module(name, backend, copied, device):
    """Ultralytics copies the model for its moving average of the weights, and pickles the whole model."""
    module, x, grad_out = _problem(name, backend, device)
    before = COPIES[copied](module)
    expected = run(module, x, grad_out)
    after = COPIES[copied](module)
    for twin in (before, after):
        assert twin.backend == backend
        actual = run(twin, x, grad_out)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_module
@every_backend
def test_autocast_runs_in_half_precision(name, backend, dtype, device):
    module, x, grad_out = _problem(name, backend, device)
    expected = run(reference_of(module), x.double(), grad_out.double())
    with torch.autocast(device.type, dtype):
        actual = run(module, x, grad_out)
    assert actual["out"].dtype == dtype
    assert all(actual[key].dtype == torch.float32 for key in expected if key != "out")
    # Results are rounded to 8 or 11 bits a few times. The router's gradient is a difference of larger terms.
    kept = [key for key in expected if not key.startswith("router")]
    tolerance = 8 * torch.finfo(dtype).eps
    assert worst(relative_error(actual[key], expected[key]) for key in kept) < tolerance
