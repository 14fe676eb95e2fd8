"""LePE's compiled kernels: they spill no registers, read 16 bytes at once, and serve every size."""

import planned
import pytest
import torch
from torch import Tensor

from bra_triton.bench.machine_code.launches import kernel_name, variant
from bra_triton.bench.machine_code.static_analysis import compile_for, resource_usage
from bra_triton.kernels.arrays import channels
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lepe import launch as triton_lepe
from bra_triton.kernels.lepe.arguments import LepeSums
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Lepe

pytestmark = pytest.mark.compiled


def launches(side: int, dtype: torch.dtype, kernel: int = 3, n_win: int = 8, dim: int = 64):
    """The launches of LePE's forward and backward."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    grid = RegionGrid.of_windows(side, side, n_win)
    shape, packed = (2, side, side, dim), (2, side, side, 3 * dim)
    inputs = [empty(*shape), empty(*packed), empty(dim, 1, kernel, kernel), empty(dim), empty(*packed)]
    plan = Plan(inputs, inputs[0].device)
    attention, qkv, weight, bias, grad_qkv = plan.given
    fill = channels(plan.scratch((3 * dim,), dtype), 2 * dim, 3 * dim) if grid.is_padded else None
    lepe = Lepe(channels(qkv, 2 * dim, 3 * dim), weight, bias, grid, fill)
    triton_lepe.launch_lepe(plan, attention, lepe, plan.output(shape, dtype))
    sums = LepeSums(
        plan.output(weight.shape, dtype),
        plan.output(bias.shape, dtype),
        None if fill is None else plan.output(fill.shape, torch.float32),
    )
    grad_value = channels(grad_qkv, 2 * dim, 3 * dim)
    planned.lepe_gradient(plan, attention, grad_value, lepe, sums)
    return plan.launches


@pytest.mark.parametrize(
    ("side", "kernel", "arch", "dtype"),
    # Padding and the larger kernel: all types on one architecture, half precision on all.
    [(20, 5, arch, torch.float16) for arch in ("sm_80", "sm_100", "sm_120", "gfx942")]
    + [(20, 5, "sm_90", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    + [(40, 3, arch, torch.float16) for arch in ("sm_80", "sm_90")],
)
def test_kernels_compile_and_do_not_spill(side, kernel, dtype, arch):
    found = launches(side, dtype, kernel)
    assert [*map(kernel_name, found)] == ["lepe_forward", "lepe_backward", "finish_gradients"]
    for launch in found:
        usage = resource_usage(compile_for(launch, arch))
        assert usage.spills == 0, (launch.name, usage)


def test_the_check_sees_a_spill(monkeypatch):
    """The same check on a tile that cannot fit the registers: it must fail."""
    monkeypatch.setattr(triton_lepe, "BACKWARD_TILE", (128, 32, 1))
    usage = resource_usage(compile_for(launches(40, torch.float32)[1], "sm_90"))
    assert usage.spills > 0


@pytest.mark.parametrize("name", ["lepe_forward", "lepe_backward"])
def test_values_are_read_and_gradients_written_16_bytes_at_a_time(name):
    launch = next(each for each in launches(20, torch.float16) if kernel_name(each) == name)
    sass = compile_for(launch, "sm_90").sass
    assert "LDG.E.128" in sass
    assert "STG.E.128" in sass
    # Only the weights of the thread's 8 channels are read one by one: they lie k * k elements apart.
    assert sass.count("LDG.E.U16") <= 8


def test_sizes_do_not_compile_anew():
    """Ultralytics trains with changing image sizes."""
    for small, large in zip(launches(20, torch.float16), launches(44, torch.float16), strict=True):
        assert variant(small) == variant(large)
        sizes = [value for value in small.numbers if isinstance(value, int)]
        assert len(sizes) == (7 if kernel_name(small) == "finish_gradients" else 4)
