"""Every mode in every dtype on the Triton backend, against the float64 reference: what `make gpu-check` runs.

Without a GPU the same tests run interpreted, at tiny sizes. Every test has an id `[mode-dtype]`, so that one
mode can be selected, and one failure hides no other.
"""

import copy

import pytest
import torch
from modes import INTERPRETED, MODES, ON_GPU, Mode
from modules import region_means, run
from problems import relative_error, worst

# Rounding of float32 gives 1e-7 to 1e-6, and so should tf32x3 on tensor cores; a wrong tail, mask or scale
# gives 1e-3 and more.
FLOAT32_TOLERANCE = 1e-5
# The allowed error, as a multiple of the reference's error in the same dtype. Triton's interpreter truncates
# bfloat16 where a GPU rounds it, so it errs twice as much.
HALF_FACTOR = {("cuda", "fp16"): 2, ("cuda", "bf16"): 2, ("cpu", "fp16"): 2, ("cpu", "bf16"): 4}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# How much a region's last chosen logit must exceed its next logit, relative to the largest logit, so that
# every dtype chooses the same regions.
MARGIN = 0.05
# The interpreter is slow: in half precision, where only the rounding differs, it runs only these tests.
HALF_INTERPRETED = {("soft_diff", "fp16"), ("auto_pad_conv", "bf16")}
# Modes that the interpreter leaves out, because other modes run the same kernels.
NOT_INTERPRETED = {"avgpool", "soft", "qkv", "auto_pad_maxpool"}

HAS_GPU = torch.cuda.is_available()
SIZES = ON_GPU if HAS_GPU else INTERPRETED
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def every_mode(interpreted=lambda mode, name: True):
    """Parametrizes a test by every mode and dtype; without a GPU, by those that `interpreted` admits."""
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
    """Module, oracle, map and the output's gradient; every region's choice has a margin, see `clear_cut`."""
    module, oracle = mode.pair(size, device)
    x = clear_cut(oracle, mode.map(size, device, seed=0), size.topk)
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return module, oracle, x, grad_out.to(device)


def clear_cut(oracle, x, topk):
    """Moves the map by gradient steps until `routing_margin` exceeds MARGIN in every region.

    With 49 regions no random map has such margins in all regions.
    """
    for _ in range(200):
        x = x.bfloat16().double().requires_grad_()
        margins = routing_margin(oracle, x, topk)
        if margins.min() > MARGIN:
            return x.detach()
        (slope,) = torch.autograd.grad((1.5 * MARGIN - margins).clamp(min=0).sum(), x)
        x = (x - 0.05 * slope / slope.abs().max()).detach()
    pytest.fail(f"the regions do not come to lie apart: {margins.min().item()}")


def routing_margin(oracle, x, topk):
    """How far each region's last chosen logit exceeds the largest that is not chosen: `(N, P)`.

    The difference is divided by the largest absolute logit.
    """
    logits = region_logits(oracle, x)
    ordered = logits.sort(-1, descending=True).values
    if topk == ordered.shape[-1]:
        return torch.full(ordered.shape[:-1], torch.inf)
    return (ordered[..., topk - 1] - ordered[..., topk]) / logits.detach().abs().max()


def region_logits(oracle, x):
    query, key = region_means(oracle.call_of(x))
    return query @ key.transpose(1, 2)


def errors_of(actual, truth):
    """Relative errors by name; of a gradient that is 0, relative to a similar gradient."""
    errors = {key: relative_error(actual[key], truth[key]) for key in truth}
    # A bias that is added to all keys does not change the softmax, so its gradient is 0.
    zero, neighbour = "kv_down.key.bias", "kv_down.value.bias"
    if zero in truth:
        assert truth[zero].abs().max() < 1e-9 * truth[neighbour].abs().max()
        errors[zero] = (actual[zero].double().norm() / truth[neighbour].norm()).item()
    return errors


@every_mode(
    lambda mode, name: (mode, name) in HALF_INTERPRETED or (name == "fp32" and mode not in NOT_INTERPRETED)
)
def test_matches_the_float64_reference(mode, name, device):
    """Forward and all gradients.

    In half precision the error may be `HALF_FACTOR` times that of the reference in the same dtype.
    """
    dtype = DTYPES[name]
    for size in SIZES:
        module, oracle, x, grad_out = problem(mode, size, device)
        if dtype != torch.float32:
            # The truth is computed with the rounded weights, which both compared modules have.
            module.to(dtype)
            oracle.load_state_dict(module.state_dict())
        truth = run(oracle, x, grad_out)
        actual = run(module.to(dtype), x.to(dtype), grad_out)
        errors = errors_of(actual, truth)
        allowed = dict.fromkeys(truth, FLOAT32_TOLERANCE)
        if dtype != torch.float32:
            plain = run(copy.deepcopy(oracle).to(dtype), x.to(dtype), grad_out)
            # One rounding of the result is always allowed: the reference may be exact by chance.
            unit, factor = torch.finfo(dtype).eps, HALF_FACTOR[device.type, name]
            allowed = {key: max(factor * error, unit) for key, error in errors_of(plain, truth).items()}
        assert all(actual[key].dtype == dtype for key in truth)
        wrong = {key: (errors[key], allowed[key]) for key in truth if not errors[key] <= allowed[key]}
        assert not wrong, f"{size}: (error, allowed) {wrong}"


@every_mode(lambda mode, name: (mode, name) == ("hard", "fp32"))
def test_repeats_give_the_same_bits(mode, name, device, monkeypatch):
    """Output and gradients of several runs; the order in which programs run differs between them on a GPU."""
    if mode.nchw:  # cuDNN computes the gradients of the weights of its projections
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
    """Replayed on another map, the graph gives the result of a plain call, up to the rounding of cuBLAS."""
    module, _, x, _ = problem(mode, SIZES[1], device)
    module, x = module.to(DTYPES[name]), x.to(DTYPES[name])
    other = x.flip(0)  # its regions' choices are as clear
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
    """Captured with `torch.cuda.make_graphed_callables`, a step on another map equals a plain step."""
    module, _, x, grad_out = problem(mode, SIZES[1], device)
    module, x = module.to(DTYPES[name]), x.to(DTYPES[name])
    other = x.flip(0)  # its regions' choices are as clear
    expected = {key: value.clone() for key, value in run(module, other, grad_out).items()}
    step = torch.cuda.make_graphed_callables(copy.deepcopy(module), (x.detach().requires_grad_(),))
    actual = run(step, other, grad_out)
    # Under capture cuBLAS and cuDNN may choose other algorithms, which round differently.
    tolerance = FLOAT32_TOLERANCE if name == "fp32" else 4 * torch.finfo(x.dtype).eps
    least = 1e-3 * expected["x"].double().norm()  # a gradient that is 0 consists of rounding
    errors = {
        key: relative_error(actual[key], value.double())
        for key, value in expected.items()
        if value.double().norm() > least
    }
    assert worst(errors.values()) <= tolerance, errors
