"""The torch backend's gradients against numeric derivatives in float64."""

import pytest
import torch

from bra_triton import functional
from bra_triton.call import Call
from bra_triton.modules import downsampling
from bra_triton.spec import AttentionSpec


def test_gradcheck_of_the_torch_backend():
    """The routing is piecewise constant: gradcheck's small step does not change the chosen regions."""
    spec = AttentionSpec(dim=4, qk_dim=2, num_heads=1, n_win=2, topk=2)
    qkv = torch.randn(1, 4, 4, spec.packed_dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def attend(qkv, weight, bias):
        return functional.attend(Call(qkv, spec, weight, bias))

    torch.autograd.gradcheck(attend, (qkv, weight, bias))


@pytest.mark.parametrize("soft_routing", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("mode", ["identity", *downsampling.MODES[1:]])
def test_gradcheck_of_every_mode_on_the_torch_backend(mode, soft_routing):
    """Padding, router and down-sampling together. The gradient of hard routing is not the derivative of its
    forward, so without soft routing the routing has no gradient here."""
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
        return functional.attend(Call(qkv, spec, **parts, kv_downsampling=kv_down), "torch")

    torch.autograd.gradcheck(attend, tuple(inputs.values()))
