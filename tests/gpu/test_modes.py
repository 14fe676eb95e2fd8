"""Every mode in every dtype on the Triton backend, against the float64 reference: what `make gpu-check` runs.

Without a GPU the same tests run interpreted, at tiny sizes. Every test is `[mode-dtype]`, so that a mode can
be picked, and fails alone.
"""

import copy

import pytest
import torch
from modes import INTERPRETED, MODES, ON_GPU, Mode
from modules import nchw_call, region_means, run
from problems import relative_error, worst

# Rounding of float32 gives 1e-7 to 1e-6, and tf32x3 on tensor cores should; a wrong tail, mask or scale gives
# 1e-3 and more.
FLOAT32_TOLERANCE = 1e-5
# Times the reference's error in that dtype. Triton's interpreter cuts bfloat16 off where a GPU rounds it, and
# so errs twice as much.
HALF_FACTOR = {("cuda", "fp16"): 2, ("cuda", "bf16"): 2, ("cpu", "fp16"): 2, ("cpu", "bf16"): 4}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The region that is chosen last leads the next by this much of the largest logit: no dtype routes otherwise.
MARGIN = 0.05
# What the slow interpreter leaves out: half precision, where only the rounding differs, but for these;
HALF_INTERPRETED = {("soft_diff", "fp16"), ("auto_pad_conv", "bf16")}
# and modes whose kernels others run.
NOT_INTERPRETED = {"avgpool", "soft", "qkv", "auto_pad_maxpool"}

HAS_GPU = torch.cuda.is_available()
SIZES = ON_GPU if HAS_GPU else INTERPRETED
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def every_mode(interpreted=lambda mode, name: True):
    """Every mode in every dtype, and where there is no GPU those that `interpreted` admits."""
    return pytest.mark.parametrize(
        ("mode", "name"),
        [
            pytest.param(mode, name, id=f"{mode.name}-{name}")
            for mode in MODES
            for name in DTYPES
            if HAS_GPU or interpreted(mode.name, name)
        ],
    )


def problem(mode: Mode, size, device):
    """Module, oracle, map and gradient of the output, where every region's choice is clear-cut."""
    module, oracle = mode.pair(size, device)
    x = clear_cut(oracle, mode.map(size, device, seed=0), size.topk)
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return module, oracle, x, grad_out.to(device)


def clear_cut(oracle, x, topk):
    """The map, moved until `routing_margin` is large: of 49 regions no random map has them all lie apart."""
    for _ in range(200):
        x = x.bfloat16().double().requires_grad_()
        margins = routing_margin(oracle, x, topk)
        if margins.min() > MARGIN:
            return x.detach()
        (slope,) = torch.autograd.grad((1.5 * MARGIN - margins).clamp(min=0).sum(), x)
        x = (x - 0.05 * slope / slope.abs().max()).detach()
    pytest.fail(f"the regions do not come to lie apart: {margins.min().item()}")


def routing_margin(oracle, x, topk):
    """Lead of every region's last choice over the best that it does not choose, over the largest logit."""
    logits = region_logits(oracle, x)
    ordered = logits.sort(-1, descending=True).values
    if topk == ordered.shape[-1]:
        return torch.full(ordered.shape[:-1], torch.inf)
    return (ordered[..., topk - 1] - ordered[..., topk]) / logits.detach().abs().max()


def region_logits(oracle, x):
    if hasattr(oracle, "qkv_linear"):
        call = nchw_call(oracle, oracle.qkv_linear(x))
    else:
        call = oracle._call(oracle.qkv(x), oracle._padding(x), eager=True)
    query, key = region_means(call)
    return query @ key.transpose(1, 2)


def errors_of(actual, truth):
    """Relative error of each; of a gradient that is 0, relative to that of its neighbour."""
    errors = {key: relative_error(actual[key], truth[key]) for key in truth}
    # The softmax does not see what is added to all keys.
    zero, neighbour = "kv_down.key.bias", "kv_down.value.bias"
    if zero in truth:
        assert truth[zero].abs().max() < 1e-9 * truth[neighbour].abs().max()
        errors[zero] = (actual[zero].double().norm() / truth[neighbour].norm()).item()
    return errors


@every_mode(
    lambda mode, name: (mode, name) in HALF_INTERPRETED or (name == "fp32" and mode not in NOT_INTERPRETED)
)
def test_matches_the_float64_reference(mode, name, device):
    """Forward and all gradients; in half precision at most twice the error of the reference in that dtype."""
    dtype = DTYPES[name]
    for size in SIZES:
        module, oracle, x, grad_out = problem(mode, size, device)
        if dtype != torch.float32:
            # The truth of the weights as they are rounded: what both err from alike.
            module.to(dtype)
            oracle.load_state_dict(module.state_dict())
        truth = run(oracle, x, grad_out)
        actual = run(module.to(dtype), x.to(dtype), grad_out)
        errors = errors_of(actual, truth)
        allowed = dict.fromkeys(truth, FLOAT32_TOLERANCE)
        if dtype != torch.float32:
            plain = run(copy.deepcopy(oracle).to(dtype), x.to(dtype), grad_out)
            # Where the reference happens to be exact, one rounding of the result is no error.
            unit, factor = torch.finfo(dtype).eps, HALF_FACTOR[device.type, name]
            allowed = {key: max(factor * error, unit) for key, error in errors_of(plain, truth).items()}
        assert all(actual[key].dtype == dtype for key in truth)
        wrong = {key: (errors[key], allowed[key]) for key in truth if not errors[key] <= allowed[key]}
        assert not wrong, f"{size}: (error, allowed) {wrong}"


@every_mode(lambda mode, name: (mode, name) == ("hard", "fp32"))
def test_repeats_give_the_same_bits(mode, name, device, monkeypatch):
    """Output and gradients of several runs; the order in which programs run differs between them on a GPU."""
    if mode.nchw:  # its projections are PyTorch's convolutions; the gradient of their weights is cuDNN's
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    module, _, x, grad_out = problem(mode, SIZES[-1], device)
    module, x = module.to(DTYPES[name]), x.to(DTYPES[name])
    first = {key: value.clone() for key, value in run(module, x, grad_out).items()}
    for _ in range(5 if HAS_GPU else 1):
        again = run(module, x, grad_out)
        differ = [key for key in first if not torch.equal(first[key], again[key])]
        assert not differ


@needs_gpu
@every_mode(lambda mode, name: False)
def test_never_waits_for_the_gpu(mode, name, device):
    """Forward and backward: no `.item()`, no shape that depends on data."""
    module, _, x, grad_out = problem(mode, SIZES[1], device)
    module, x = module.to(DTYPES[name]), x.to(DTYPES[name])
    run(module, x, grad_out)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(module, x, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@every_mode(lambda mode, name: False)
def test_forward_is_captured_in_a_cuda_graph(mode, name, device):
    """And replayed on another map gives what a plain call gives, to rounding: that of cuBLAS is not ours."""
    module, _, x, _ = problem(mode, SIZES[1], device)
    module, x = module.to(DTYPES[name]), x.to(DTYPES[name])
    other = x.flip(0)  # routes as clearly
    with torch.no_grad():
        expected = module(other)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up on first use must not be captured
            module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        x.copy_(other)
        graph.replay()
    tolerance = FLOAT32_TOLERANCE if name == "fp32" else torch.finfo(x.dtype).eps
    assert relative_error(out, expected.double()) <= tolerance


@needs_gpu
@every_mode(lambda mode, name: False)
def test_a_training_step_is_captured_in_cuda_graphs(mode, name, device):
    """By PyTorch's own tool: output and all gradients of another map as a plain step gives them."""
    module, _, x, grad_out = problem(mode, SIZES[1], device)
    module, x = module.to(DTYPES[name]), x.to(DTYPES[name])
    other = x.flip(0)  # routes as clearly
    expected = {key: value.clone() for key, value in run(module, other, grad_out).items()}
    step = torch.cuda.make_graphed_callables(copy.deepcopy(module), (x.detach().requires_grad_(),))
    actual = run(step, other, grad_out)
    # Rounding of cuBLAS and cuDNN, which may choose other algorithms under capture, is not ours.
    tolerance = FLOAT32_TOLERANCE if name == "fp32" else 4 * torch.finfo(x.dtype).eps
    least = 1e-3 * expected["x"].double().norm()  # of a gradient that is 0, only rounding is left
    errors = {
        key: relative_error(actual[key], value.double())
        for key, value in expected.items()
        if value.double().norm() > least
    }
    assert worst(errors.values()) <= tolerance, errors
