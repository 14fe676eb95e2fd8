"""The torch backend on a GPU, against the float64 reference: every mode in float32 and float16.

The tests of modes have ids `[torch-mode-dtype-check]`, so `-k "[torch-"` selects them. Without a GPU all
tests are skipped; `tests/kernels/test_torch_on_nvidia.py` runs the same path on the CPU.
"""

import copy
import functools
import inspect

import pytest
import test_modes
import torch
from modes import MODES, ON_GPU
from problems import relative_error

from bra_triton import functional
from bra_triton.backend.torch import chunks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHECKS = {
    "right": test_modes.test_matches_the_float64_reference,
    "repeats": test_modes.test_repeats_give_the_same_bits,
    "never_waits": test_modes.test_never_waits_for_the_gpu,
    "forward_graph": test_modes.test_forward_is_captured_in_a_cuda_graph,
    "step_graphs": test_modes.test_a_training_step_is_captured_in_cuda_graphs,
}
# The loss is the output's sum of squares, so rounding of the output changes the gradient. A region that is
# missing gives 0.1 and more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
make_problem = test_modes.problem


@functools.cache
def _problem(name, size, device):
    return make_problem(next(mode for mode in MODES if mode.name == name), size, device)


def torch_problem(mode, size, device):
    """The problem of `test_modes`, made once for each mode and size, with the module on the torch backend."""
    module, oracle, x, grad_out = _problem(mode.name, size, device)
    module, oracle = copy.deepcopy(module), copy.deepcopy(oracle)
    module.backend = "torch"
    return module, oracle, x, grad_out


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("mode", "name"),
    [pytest.param(mode, name, id=f"torch-{mode.name}-{name}") for mode in MODES for name in ("fp32", "fp16")],
)
def test_every_mode(mode, name, check, device, monkeypatch):
    """Runs a test of `test_modes` with the torch backend."""
    monkeypatch.setattr(test_modes, "problem", torch_problem)
    monkeypatch.setattr(test_modes, "SIZES", ON_GPU[:2])
    arguments = {"mode": mode, "name": name, "device": device, "monkeypatch": monkeypatch}
    wanted = inspect.signature(CHECKS[check]).parameters
    CHECKS[check](**{key: arguments[key] for key in wanted})


@pytest.mark.parametrize("factor", ["none", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head_dims", [(16, 16), (16, 32), (12, 20), (5, 6), (128, 128)])
@pytest.mark.parametrize("most", [None, 1, 5])
def test_kernels_agree_on_all_heads(most, head_dims, dtype, factor, device, monkeypatch):
    """Chunks of several sizes; heads that PyTorch's kernel takes, and others; 25, 100 and 225 keys.

    Of the 225 keys with padding 100 are chosen under a mask, where PyTorch's kernel serves.
    """
    if most:
        monkeypatch.setattr(chunks, "regions_at_once", lambda *args, **kwargs: most)
    qk_head_dim, v_head_dim = head_dims
    for topk in (1, 4, 9):
        qkv = torch.randn(2, 14, 15, 2 * (2 * qk_head_dim + v_head_dim), device=device).to(dtype)
        means = torch.randn(2, 3, 3, qkv.shape[-1], device=device).to(dtype)
        qkv = qkv + 2 * means.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :14]
        arguments = {
            **{"num_heads": 2, "n_win": 3, "topk": topk, "qk_dim": 2 * qk_head_dim},
            **{"soft_routing": factor == "soft", "padding": torch.randn(qkv.shape[-1], device=device)},
        }
        results = []
        for backend, x in (("torch", qkv), ("reference", qkv.double())):
            x = x.detach().requires_grad_()
            out = functional.bi_level_routing_attention(x, **arguments, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for actual, expected in zip(*results, strict=True):
            assert relative_error(actual, expected) < TOLERANCE[dtype]
