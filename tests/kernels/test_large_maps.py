"""Maps of more than 2**31 elements: every offset past 32 bits must be computed in 64.

The maps are slices of very wide packed ones, so that few tokens lie far apart: addresses are reserved for all
of it, but only the pages of these tokens are ever touched.
"""

import attention_oracle
import pytest
import torch
from problems import relative_error, worst

from bra_triton.kernels.attention import launch as attention
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lepe import launch as lepe
from bra_triton.kernels.pooling import launch as pooling
from bra_triton.kernels.pooling.problem import MAX, RegionPooling
from bra_triton.kernels.problem import Gradients, Lepe, RoutedAttention
from bra_triton.kernels.routing import launch as routing

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
    out, _, lse = attention.attention_forward(far)
    grad_out = torch.randn_like(out)
    attention.attention_backward(grad_out, far, out, lse, gradients)
    expected = attention_oracle.gradients(near, grad_out)
    actual = {"out": out, "query": gradients.query, "key": gradients.key, "value": gradients.value}
    errors = {name: relative_error(actual[name].cpu(), expected[name]) for name in actual}
    assert worst(errors.values()) < 4 * torch.finfo(torch.float16).eps, errors


def test_means_lepe_and_pooling(wide, device):
    x, attention_out = (torch.randn(1, SIDE, SIDE, 16, device=device).half() for _ in range(2))
    far = wide(x)
    packed = far.as_strided((1, SIDE, SIDE, ROW), far.stride())
    assert torch.equal(routing.region_means(packed, None, GRID, 16), routing.region_means(x, None, GRID, 16))
    weight = torch.randn(16, 1, 3, 3, device=device).half()
    outs = [lepe.lepe_forward(attention_out, Lepe(v, weight, None, GRID)) for v in (far, x)]
    assert torch.equal(*outs)
    cells = torch.tensor([[0, 2], [2, 4]], dtype=torch.int32, device=device)
    pooled = [pooling.pool_forward(v, None, RegionPooling(cells, cells, MAX, GRID))[0] for v in (far, x)]
    assert torch.equal(*pooled)
    near_grad = torch.randn(1, SIDE, SIDE, 16, device=device).half()
    far_grad = wide(near_grad)
    grads = [
        lepe.lepe_backward(attention_out, grad, Lepe(v, weight, None, GRID))
        for grad, v in ((far_grad, far), (near_grad, x))
    ]
    assert torch.equal(far_grad, near_grad)
    assert torch.equal(grads[0].weight, grads[1].weight)
    description = RegionPooling(cells, cells, MAX, GRID)
    _, argmax = pooling.pool_forward(x, None, description)
    for grad, v in ((far_grad, far), (near_grad, x)):
        pooling.pool_backward(pooled[1], v, None, argmax, description, None, grad)
    assert torch.equal(far_grad, near_grad)
