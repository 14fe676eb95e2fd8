"""The gradients of LePE's convolution on the torch backend, for each kind of device, against float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from problems import relative_error

from bra_triton.backend.torch import lepe

HALVES = (torch.float16, torch.bfloat16)
WANTED = [(True, True), (True, False), (False, False)]
# Float32 sums of at most a few hundred products, each rounded at 6e-8; errors partly cancel.
FLOAT32_TOLERANCE = 1e-6


def _inputs(kernel, dtype, device, width=4):
    """Gradient of the output, map and weight; and the true gradients of map, weight and bias."""
    grad, x = (torch.randn(2, 6, 5, width).to(device, dtype) for _ in range(2))
    weight = torch.randn(6, 1, kernel, kernel).to(device, dtype)
    inputs = [each.double().requires_grad_() for each in (x, weight, torch.zeros(6, device=device))]
    out = F.conv2d(*inputs, padding=kernel // 2, groups=6)
    return (grad, x, weight), torch.autograd.grad(out, inputs, grad.double())


def _check(actual, expected, wanted, tolerances):
    assert [each is not None for each in actual] == [True, *wanted]
    for each, truth, tolerance in zip(actual, expected, tolerances, strict=True):
        assert each is None or relative_error(each, truth) < tolerance


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_by_taps(kernel, dtype, wanted, device):
    """On devices other than the CPU and NVIDIA's GPUs; here on any device."""
    given, expected = _inputs(kernel, dtype, device)
    # The map's gradient is rounded to its dtype; the sums are in float32 or float64.
    tolerances = torch.finfo(dtype).eps, *((FLOAT32_TOLERANCE,) * 2)
    _check(lepe.derive_by_taps(*given, wanted), expected, wanted, tolerances)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
def test_on_the_cpu(kernel, width, dtype, wanted):
    """Widths on both sides of `kernel // 2`, up to which the columns of a kernel are not taken apart."""
    given, expected = _inputs(kernel, dtype, "cpu", width)
    _check(lepe._derive_on_cpu(*given, wanted), expected, wanted, [FLOAT32_TOLERANCE] * 3)


@pytest.mark.parametrize(
    ("kernel", "width", "dtype", "parts"),
    [
        (3, 9, torch.float32, 0),  # one call computes all gradients
        (5, 9, torch.float32, 2),
        (7, 9, torch.bfloat16, 3),
        (9, 5, torch.float32, 3),
        (9, 4, torch.float32, 0),  # a part of the kernel would meet no column of the map
        (5, 9, torch.float16, 2),
        (5, 9, torch.float64, 0),  # oneDNN does not compute in float64
    ],
)
def test_wide_kernels_are_taken_apart(kernel, width, dtype, parts):
    given, _ = _inputs(kernel, dtype, "cpu", width)
    with mock.patch.object(lepe, "_convolution_backward", side_effect=lepe._convolution_backward) as backward:
        lepe._derive_on_cpu(*given, (True, True))
    columns = [call.args[2].shape[-1] for call in backward.call_args_list]
    assert sum(columns) == kernel
    assert len(columns) == max(1, parts)
    assert not parts or max(columns) == 3
