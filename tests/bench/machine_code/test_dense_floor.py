"""The dense floor computes attention and its gradients: a floor that computes the wrong thing is none."""

import math
from dataclasses import replace

import pytest
import torch
import triton

from bra_triton.bench.machine_code import dense_floor
from bra_triton.bench.machine_code.analysis import analyse
from bra_triton.bench.machine_code.dense_floor import DenseTile, find_floors, may_fit_registers, specimen

LENGTH, SEQUENCES, QK_HEAD_DIM, V_HEAD_DIM = 64, 2, 16, 32
TINY = DenseTile(64, 64, 4, 2, False)


def relative_error(actual, expected):
    return (torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)).item()


@pytest.fixture
def problem(device):
    """Inputs that float16 holds exactly, and attention with its gradients in float64."""
    widths = {"query": QK_HEAD_DIM, "key": QK_HEAD_DIM, "value": V_HEAD_DIM, "grad_out": V_HEAD_DIM}
    given = {
        name: torch.randn(SEQUENCES, LENGTH, width, device=device).half().double()
        for name, width in widths.items()
    }
    leaves = [given[name].requires_grad_() for name in ("query", "key", "value")]
    scale = 0.3
    logits = scale * leaves[0] @ leaves[1].mT
    out = logits.softmax(-1) @ leaves[2]
    expected = dict(
        zip(
            ("grad_query", "grad_key", "grad_value"),
            torch.autograd.grad(out, leaves, given["grad_out"]),
            strict=True,
        )
    )
    expected |= {"out": out.detach(), "lse": logits.logsumexp(-1).detach() / math.log(2)}
    statistics = torch.stack([expected["lse"], (given["grad_out"] * expected["out"]).sum(-1)], -1).float()
    return {name: x.detach() for name, x in given.items()}, statistics, expected, scale


def launch(kernel, tensors, scale, block_m, block_n, split):
    own = block_n if kernel == "key_value_gradient" else block_m
    sizes = {"QK_HEAD_DIM": QK_HEAD_DIM, "V_HEAD_DIM": V_HEAD_DIM, "BLOCK_M": block_m, "BLOCK_N": block_n}
    scalars = {"logit_scale": scale * math.log2(math.e), "scale": scale, "length": LENGTH}
    names = dense_floor.KERNELS[kernel].arg_names
    arguments = {name: value for name, value in {**tensors, **scalars, **sizes}.items() if name in names}
    grid = (triton.cdiv(LENGTH, own), SEQUENCES)
    dense_floor.KERNELS[kernel][grid](**arguments, PRECISION="ieee", SPLIT=split)


# Unequal blocks, several programs and several steps: a row and a column swapped, or a start forgotten, shows.
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32)])
@pytest.mark.parametrize("kernel", dense_floor.KERNELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Float16: probabilities and dS are rounded to 11 bits before they enter a product.
    [(torch.float16, 2e-3), (torch.float32, 1e-6)],
    ids=["float16", "float32"],
)
def test_dense_kernels_compute_attention(problem, kernel, block_m, block_n, split, dtype, tolerance):
    given, statistics, expected, scale = problem
    results = {
        "attention_forward": ("out", "lse"),
        "query_gradient": ("grad_query",),
        "key_value_gradient": ("grad_key", "grad_value"),
    }[kernel]
    outputs = {
        name: torch.full_like(
            expected[name].contiguous(), float("nan"), dtype=torch.float32 if name == "lse" else dtype
        )
        for name in results
    }
    inputs = {name: x.to(dtype) for name, x in given.items()} | {"statistics": statistics}
    launch(kernel, inputs | outputs, scale, block_m, block_n, split)
    for name in results:
        assert relative_error(outputs[name], expected[name]) < tolerance, name


def test_tiles_that_must_spill_are_not_compiled():
    wide = DenseTile(128, 128, 4, 2, False)
    assert may_fit_registers("attention_forward", 64, wide)
    assert not may_fit_registers("query_gradient", 64, wide)
    assert may_fit_registers("key_value_gradient", 64, replace(wide, num_warps=8))


@pytest.mark.compiled
@pytest.mark.parametrize("kernel", dense_floor.KERNELS)
def test_the_floor_is_the_cheapest_loop_that_does_not_spill(kernel):
    key = (kernel, 32, "sm_80", "")
    small = replace(TINY, step=32)
    floor = find_floors({key: (TINY, small)})[key]
    costs = {tile: analyse(specimen(kernel, 32, "fp16", tile), "sm_80") for tile in (TINY, small)}
    assert floor.tile == min(costs, key=lambda tile: costs[tile].slots_per_score)
    assert floor.slots_per_score == costs[floor.tile].slots_per_score


@pytest.mark.compiled
def test_a_spilling_loop_is_no_floor(monkeypatch):
    """128 x 64 with four warps spills dK/dV at heads of 64; nothing else is offered."""
    monkeypatch.setattr(dense_floor, "may_fit_registers", lambda *arguments: True)
    crowded = DenseTile(128, 64, 4, 2, False)
    assert analyse(specimen("key_value_gradient", 64, "fp16", crowded), "sm_80").usage.spills
    assert find_floors({("key_value_gradient", 64, "sm_80", ""): (crowded,)}) == {}
