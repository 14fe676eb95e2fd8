"""Routing, attention and LePE of a packed projection: every backend against the reference in float64."""

from dataclasses import replace

import planned
import pytest
import torch
from problems import relative_error, worst

from bra_triton import reference
from bra_triton.backend.kernels import fused_kernels
from bra_triton.backend.torch import masked
from bra_triton.call import Call
from bra_triton.kernels.forms import ROUTED, use_form
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.packed import plan_attend, plan_attend_backward
from bra_triton.kernels.problem import Needs, PackedAttention
from bra_triton.spec import AttentionSpec

BACKENDS = ("torch", "triton")
# The largest error comes from the softmax of the regions' float32 logits; others are some units of 1e-7.
TOLERANCE = 3e-5
SPEC = AttentionSpec(dim=24, qk_dim=16, num_heads=2, n_win=2, topk=2)
SOFT = replace(SPEC, soft_routing=True, diff_routing=True)
HARD = replace(SPEC, diff_routing=True)
# Specification, height and width of the map.
CASES = {
    "none": (SPEC, 4, 6),
    "padded": (SPEC, 5, 5),
    "soft": (SOFT, 4, 6),
    "soft_padded": (SOFT, 5, 5),
    "soft_frozen": (replace(SPEC, soft_routing=True), 4, 6),
    "hard": (HARD, 4, 6),
    "hard_padded": (HARD, 5, 5),
    "hard_padding_left_out": (replace(HARD, counts_padding=False), 5, 5),
    "whole": (replace(SPEC, topk=4), 4, 6),
    "whole_padded": (replace(SPEC, topk=4), 5, 5),
    # All regions are chosen, but the gradient of the routing weights is needed.
    "hard_all": (replace(HARD, topk=4), 4, 6),
}
NAMES = ("qkv", "padding", "lepe_weight", "lepe_bias")


def _tensors(spec, height, width, device):
    """Float64 tensors by name; means of the regions lie far apart, so that every precision routes alike."""
    grid = RegionGrid.of_windows(height, width, spec.n_win)
    means = 2 * torch.randn(2, spec.n_win, spec.n_win, spec.packed_dim)
    means = means.repeat_interleave(grid.region_height, 1).repeat_interleave(grid.region_width, 2)
    tensors = {
        "qkv": torch.randn(2, height, width, spec.packed_dim) / 2 + means[:, :height, :width],
        "padding": torch.randn(spec.packed_dim) if grid.is_padded else None,
        "lepe_weight": torch.randn(spec.dim, 1, 3, 3),
        "lepe_bias": torch.randn(spec.dim),
    }
    return {
        name: None if x is None else x.bfloat16().double().to(device).requires_grad_()
        for name, x in tensors.items()
    }


def _expected(spec, tensors, grad_out):
    call = Call(tensors["qkv"], spec, *(tensors[name] for name in ("lepe_weight", "lepe_bias", "padding")))
    out = reference.attend(call).out
    leaves = {name: x for name, x in tensors.items() if x is not None}
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.double())
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def _problem(spec, tensors):
    narrow = {name: None if x is None else x.detach().float() for name, x in tensors.items()}
    grid = RegionGrid.of_windows(*narrow["qkv"].shape[1:3], spec.n_win)
    return PackedAttention(
        narrow["qkv"],
        None,
        narrow["padding"],
        None,
        *(narrow["lepe_weight"], narrow["lepe_bias"]),
        spec.settings(grid),
    )


def _needs(problem):
    return Needs(*(x is not None for x in problem.tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_all_gradients(name, backend, device):
    _check_output_and_gradients(name, backend, device)


@pytest.mark.parametrize("name", ["none", "padded", "soft_frozen"])
def test_maps_that_are_taken_for_small_are_right_with_lists_too(name, device):
    with use_form(ROUTED):
        _check_output_and_gradients(name, "triton", device)


@pytest.mark.parametrize("name", ["none", "padded", "hard_padded"])
def test_regions_that_the_torch_backend_masks_are_right_gathered_too(name, device, monkeypatch):
    monkeypatch.setattr(masked, "is_cheaper", lambda *_: False)
    _check_output_and_gradients(name, "torch", device)


def _check_output_and_gradients(name, backend, device):
    spec, height, width = CASES[name]
    tensors = _tensors(spec, height, width, device)
    problem, kernels = _problem(spec, tensors), fused_kernels(backend)
    grad_out = torch.randn(2, height, width, spec.dim, device=device)
    expected = _expected(spec, tensors, grad_out)
    with planned.poisoned():
        out, saved = kernels.attend(problem, trains=True)
        gradients = kernels.attend_backward(grad_out, problem, out, saved, _needs(problem))
    actual = {"out": out, **{n: getattr(gradients, n) for n in NAMES}}
    assert {n for n, x in actual.items() if x is not None} == set(expected)
    errors = {n: relative_error(actual[n], expected[n]) for n in expected}
    assert worst(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("name", "before"), [("whole", []), ("whole_padded", ["list_tokens_kernel"])])
def test_where_all_attend_to_all_nothing_is_routed(name, before, device):
    """Without padding there is no list either: kernels read the map row by row."""
    spec, height, width = CASES[name]
    problem = _problem(spec, _tensors(spec, height, width, device))
    forward = plan_attend(problem, trains=True)
    assert [launch.name for launch in forward.launches] == [*before, "attention_forward_kernel"]
    grad_out = torch.empty(2, height, width, spec.dim, device=device)
    kept = torch.empty(forward.kept_bytes, dtype=torch.uint8, device=device)
    backward = plan_attend_backward(problem, (grad_out, None, kept), _needs(problem))
    names = [launch.name for launch in backward.launches]
    assert names[:2] == ["query_gradient_kernel", "key_value_gradient_kernel"]
    assert names[2:] == ["lepe_backward_kernel", "finish_gradients_kernel"]
