"""On the CPU the torch backend computes in float32 what is slow in half precision.

These are all gradients and, where oneDNN does not convolve in half precision, LePE. The results then have the
bits of a float32 problem's, rounded once.
"""

from dataclasses import replace

import pytest
import torch
from attention_parts import PARTS, make
from problems import relative_error

from bra_triton.backend.torch import attention, lepe, masked
from bra_triton.kernels.problem import Lepe, Padding

HALVES = [torch.float16, torch.bfloat16]
MAPS = ("query", "key", "value")


def _in_float32(problem):
    padding = problem.padding and Padding(*(x.float() for x in (problem.padding.key, problem.padding.value)))
    maps = {name: getattr(problem, name).float() for name in MAPS}
    return replace(problem, **maps, padding=padding)


@pytest.mark.parametrize("is_masked", [False, True], ids=["gathered", "masked"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["packed", "padding"])
def test_gradients_of_the_attention(name, dtype, is_masked, monkeypatch):
    if is_masked:
        monkeypatch.setattr(masked, "_REGION", 10**9)
    problem = replace(make(PARTS[name], "cpu", dtype), distinct=is_masked)
    grad_out = torch.randn(problem.query.shape).to(dtype)
    out, lse = attention.attend_routed(problem)
    actual = attention.attend_routed_backward(grad_out, problem, out, lse)
    expected = attention.attend_routed_backward(grad_out.float(), _in_float32(problem), out.float(), lse)
    for name in MAPS:
        assert torch.equal(getattr(actual, name), getattr(expected, name).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["packed", "padding"])
@pytest.mark.parametrize("kernel", [3, 5])  # 5 columns are taken apart for the weight's gradient
@pytest.mark.parametrize("is_native", [False, True], ids=["not native", "native"])
def test_lepe_and_its_gradients(is_native, kernel, name, dtype, monkeypatch):
    monkeypatch.setattr(lepe, "_is_native", lambda dtype: is_native)
    problem = make(PARTS[name], "cpu", dtype)
    dim = problem.value.shape[-1]
    tensors = [problem.value, torch.randn(dim, 1, kernel, kernel).to(dtype), torch.randn(dim).to(dtype)]
    fill = None if problem.padding is None else problem.padding.value
    of_half = Lepe(*tensors, problem.kv_grid, fill)
    of_float32 = Lepe(*(x.float() for x in tensors), problem.kv_grid, None if fill is None else fill.float())

    out, grad_out, grad_value = (torch.randn(problem.value.shape).to(dtype) for _ in range(3))
    expected = lepe.lepe_forward(out.float(), of_float32)
    actual = lepe.lepe_forward(out, of_half)
    assert actual.dtype == dtype
    if is_native:  # two roundings: of the convolution and of the sum
        assert relative_error(actual, expected) < 2 * torch.finfo(dtype).eps
    else:
        assert torch.equal(actual, expected.to(dtype))
    wide = grad_value.float()
    of_others = lepe.lepe_backward(grad_out.float(), wide, of_float32)
    for each, other in zip(lepe.lepe_backward(grad_out, grad_value, of_half), of_others, strict=True):
        assert each is other is None or torch.equal(each, other)
    assert torch.equal(grad_value, wide.to(dtype))
