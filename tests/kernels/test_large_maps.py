"""Maps of more than 2**31 elements: every offset past 32 bits must be computed in 64.

The maps are slices of very wide packed ones, so that few tokens lie far apart: addresses are reserved for all
of it, but only the pages of these tokens are ever touched.
"""

import attention_oracle
import planned
import pytest
import torch
from problems import relative_error, worst

from bra_triton.kernels import calls
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lepe.arguments import LepeSums
from bra_triton.kernels.lepe.launch import launch_lepe
from bra_triton.kernels.pooling.problem import MAX, RegionPooling
from bra_triton.kernels.problem import Gradients, Lepe, RoutedAttention
from bra_triton.kernels.routing.launch import launch_spread_means

SIDE, ROW = 8, 2**25 + 2**22  # 64 tokens, the last at 2.37e9
GRID = RegionGrid.of_windows(SIDE, SIDE, 2)


@pytest.fixture
def wide(device):
    """Makes a `(1, 8, 8, 16)` slice at the start of rows of ROW float16 elements, 4.5 GiB of addresses."""

    def make(fill):
        try:
            packed = torch.empty(1, SIDE, SIDE, ROW, dtype=torch.float16, device=device)
        except RuntimeError:
            pytest.skip("no 4.5 GiB of addresses")
        part = packed[..., : fill.shape[-1]]
        part.copy_(fill)
        assert (SIDE * SIDE - 1) * ROW > 2**31
        return part

    return make


def test_attention_forward_and_backward(wide, device):
    maps = [torch.randn(1, SIDE, SIDE, 16, device=device).half() for _ in range(3)]
    r_idx = torch.tensor([[1, 3], [3, 0], [0, 1], [2, 3]], dtype=torch.int32, device=device)
    near = RoutedAttention(*maps, r_idx.view(1, 1, 4, 2), GRID, GRID, 1, 0.25)
    far = RoutedAttention(*(wide(x) for x in maps), near.r_idx, GRID, GRID, 1, 0.25)
    gradients = Gradients(*(wide(torch.zeros_like(x)) for x in maps))
    grad_out = torch.randn_like(maps[2])
    actual = attention_oracle.run_backend("triton", far, grad_out, targets=gradients)
    expected = attention_oracle.gradients(near, grad_out)
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    assert worst(errors.values()) < 4 * torch.finfo(torch.float16).eps, errors


def test_means_their_gradient_lepe_and_pooling(wide, device):
    x, attention_out = (torch.randn(1, SIDE, SIDE, 16, device=device).half() for _ in range(2))
    far = wide(x)
    packed = far.as_strided((1, SIDE, SIDE, ROW), far.stride())
    assert torch.equal(calls.region_means(packed, None, GRID, 16), calls.region_means(x, None, GRID, 16))
    weight = torch.randn(16, 1, 3, 3, device=device).half()
    outs = [torch.empty_like(x) for _ in range(2)]
    for out, v in zip(outs, (far, x), strict=True):
        planned.run(launch_lepe, attention_out, Lepe(v, weight, None, GRID), out)
    assert torch.equal(*outs)
    cells = torch.tensor([[0, 2], [2, 4]], dtype=torch.int32, device=device)
    description = RegionPooling(cells, cells, MAX, GRID)
    pooled = [calls.pool(v, None, description)[0] for v in (far, x)]
    assert torch.equal(*pooled)
    near_grad = torch.randn(1, SIDE, SIDE, 16, device=device).half()
    far_grad = wide(near_grad)
    grad_weights = [torch.empty_like(weight) for _ in range(2)]
    for grad, v, grad_weight in zip((far_grad, near_grad), (far, x), grad_weights, strict=True):
        gradients = LepeSums(grad_weight, None, None)
        lepe = Lepe(v, weight, None, GRID)
        planned.run(planned.lepe_gradient, attention_out, grad, lepe, gradients)
    assert torch.equal(far_grad, near_grad)
    assert torch.equal(*grad_weights)
    grad_means = torch.randn(1, GRID.n_regions, 16, device=device)
    packed_grad = far_grad.as_strided((1, SIDE, SIDE, ROW), far_grad.stride())
    for grad in (packed_grad, near_grad):
        planned.run(launch_spread_means, grad_means, grad, GRID, True)
    assert torch.equal(far_grad, near_grad)
    _, argmax = calls.pool(x, None, description)
    for grad, v in ((far_grad, far), (near_grad, x)):
        calls.pool_backward(pooled[1], v, None, argmax, description, None, grad)
    assert torch.equal(far_grad, near_grad)
