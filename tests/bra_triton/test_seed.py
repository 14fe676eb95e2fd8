"""The drop-in against the original module: same `state_dict`, outputs and gradients in every mode it has."""

import pytest
import seed_module
import torch
from problems import relative_error, worst

from bra_triton import BiLevelRoutingAttention

SIZE = {"dim": 12, "num_heads": 2, "n_win": 2, "topk": 3}
DIFF = {"diff_routing": True}
SOFT = {"soft_routing": True}
MODES = {
    "identity": {},
    "no LePE": {"side_dwconv": 0},
    "LePE 5": {"side_dwconv": 5},
    "qkv": {"param_attention": "qkv"},
    "qk_narrow": {"qk_dim": 8, "qk_scale": 0.7},
    "qk_wide": {"qk_dim": 20},
    "whole": {"topk": 4},
    "soft": SOFT,
    "soft_diff": SOFT | DIFF,
    "param_routing": SOFT | DIFF | {"param_routing": True, "qk_dim": 8},
    "ada_avgpool": {"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2},
    "ada_maxpool": {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 2},
    "avgpool": {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2, "qk_dim": 8},
    "maxpool": {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2},
    "soft_maxpool": SOFT | DIFF | {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2},
    "negative": {"qk_scale": -0.3},
    "negative, soft": SOFT | {"qk_scale": -0.3},
    "negative, whole": {"qk_scale": -0.3, "topk": 4},
    "negative, param_routing": SOFT | DIFF | {"param_routing": True, "qk_dim": 8, "qk_scale": -0.3},
    "negative, avgpool": {"qk_scale": -0.3, "kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2},
    "ratio 1": {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 1},
}
# Modes for the Triton backend, one for each kernel: the interpreter is slow. They run in float32, since the
# backend has no float64.
INTERPRETED = ("identity", "param_routing", "maxpool", "negative")
# For the norm of the difference divided by the norm of the result. Rounding gives some 1e-16 in float64, 1 to
# 4e-7 in float32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def _run(module, x, grad_out):
    """Output, input gradient and parameter gradients, by name."""
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad_out)
    return {"out": out.detach(), "x": x.grad, **{k: p.grad for k, p in module.named_parameters()}}


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["divisible", "padded"])
@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        *((mode, backend) for mode in MODES for backend in ("reference", "torch")),
        *((mode, "triton") for mode in INTERPRETED),
    ],
)
def test_is_the_original_module(mode, backend, size, device):
    arguments = {**SIZE, "auto_pad": size == (5, 7), **MODES[mode]}
    seed = seed_module.BiLevelRoutingAttention(**arguments).double().to(device)
    module = BiLevelRoutingAttention(**arguments, backend=backend).double().to(device)
    module.load_state_dict(seed.state_dict(), strict=True)
    seed.load_state_dict(module.state_dict(), strict=True)
    # Regions have different means, so that float32 routes as float64 does.
    means = (
        torch.randn(2, 2, 2, 12).repeat_interleave(size[0] // 2 + 1, 1).repeat_interleave(size[1] // 2 + 1, 2)
    )
    x = (torch.randn(2, *size, 12) + 2 * means[:, : size[0], : size[1]]).double().to(device)
    grad_out = torch.randn_like(x)
    expected = _run(seed, x, grad_out)
    dtype = torch.float32 if backend == "triton" else torch.float64
    actual = _run(module.to(dtype), x.to(dtype), grad_out.to(dtype))
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert worst(errors.values()) < TOLERANCES[dtype], errors


def test_attention_matrix_and_routing_are_the_originals():
    arguments = {**SIZE, "auto_pad": True, **MODES["param_routing"]}
    seed = seed_module.BiLevelRoutingAttention(**arguments).double()
    module = BiLevelRoutingAttention(**arguments).double()
    module.load_state_dict(seed.state_dict())
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    expected, actual = seed(x, ret_attn_mask=True), module(x, ret_attn_mask=True)
    assert torch.equal(actual[2], expected[2])
    assert worst(relative_error(actual[i], expected[i]) for i in (0, 1, 3)) < 1e-12
