"""Plans find, allocate and keep the right arrays: the numbers that their launches compute are correct."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from bra_triton.backend.kernels import fused_kernels
from bra_triton.kernels import plan as plan_module
from bra_triton.kernels.arrays import Buffer, channels
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.plan import Kept, Plan
from bra_triton.kernels.problem import PackedAttention, Settings

BLOCK = 64


class Addends(NamedTuple):
    first: Buffer
    second: Buffer | None


class Config(NamedTuple):
    COLUMNS: int
    FIRST_STRIDE: int
    SECOND_STRIDE: int
    OUT_STRIDE: int
    BLOCK: int


@triton.jit(do_not_specialize=["n_rows"])
def add_kernel(addends, out, factor, n_rows, CONFIG: tl.constexpr):
    """`out = first * factor + second`, rows of COLUMNS elements, BLOCK elements a program."""
    index = tl.program_id(0) * CONFIG.BLOCK + tl.arange(0, CONFIG.BLOCK)
    row, column = index // CONFIG.COLUMNS, index % CONFIG.COLUMNS
    live = row < n_rows
    total = tl.load(addends.first + row * CONFIG.FIRST_STRIDE + column, mask=live, other=0.0) * factor
    if addends.second is not None:
        total += tl.load(addends.second + row * CONFIG.SECOND_STRIDE + column, mask=live, other=0.0)
    tl.store(out + row * CONFIG.OUT_STRIDE + column, total, mask=live)


def _launch_add(plan, first, second, out, factor):
    n_rows, columns = out.shape
    stride = 0 if second is None else second.stride()[0]
    plan.launch(
        add_kernel,
        (-(-n_rows * columns // BLOCK),),
        (Addends(first, second), out),
        (factor, n_rows, Config(columns, first.stride()[0], stride, out.stride()[0], BLOCK)),
        num_warps=1,
    )


def _plan_of_sums(*inputs):
    """A plan for `2 * a + b` that uses an array in the workspace."""
    plan = Plan(inputs, inputs[0].device)
    a, b = plan.inputs
    out = plan.output(a.shape, torch.float32)
    double = plan.scratch(a.shape, torch.float32)
    _launch_add(plan, a, None, double, 2.0)
    _launch_add(plan, double, b, out, 1.0)
    return plan


def test_launches_run_in_order_and_a_plan_serves_other_tensors(device):
    plan = None
    for _ in range(2):
        a, b = torch.randn(2, 9, 20, device=device)
        plan = plan or _plan_of_sums(a, b)
        assert torch.equal(plan.run(a, b)[0], 2 * a + b)
    assert [launch.name for launch in plan.launches] == ["add_kernel", "add_kernel"]


def test_an_input_that_is_not_there(device):
    a = torch.randn(9, 20, device=device)
    plan = _plan_of_sums(a, None)
    assert len(plan.given) == 1
    assert torch.equal(plan.run(a, None)[0], 2 * a)


@pytest.mark.parametrize("start", [0, 1, 2, 8])
def test_inputs_may_be_slices_of_wider_ones(start, device):
    """A plan finds the offset of its inputs at every run; it does not keep that of the first inputs."""
    wide = torch.randn(2, 9, 50, device=device)
    a, b = wide[..., start : start + 20]
    plan = _plan_of_sums(*wide[..., 16:36])
    assert torch.equal(plan.run(a, b)[0], 2 * a + b)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_inputs_may_start_anywhere_in_memory(shift, device):
    """A plan made for tensors at multiples of 16 bytes runs on others, and the other way round."""
    memory = torch.randn(2 * 180 + 3, device=device)
    a, b = torch.randn(2, 9, 20, device=device)
    shifted_a, shifted_b = memory[shift : shift + 360].view(2, 9, 20)
    shifted_a.copy_(a)
    shifted_b.copy_(b)
    for plan in (_plan_of_sums(a, b), _plan_of_sums(shifted_a, shifted_b)):
        for first, second in ((a, b), (shifted_a, b), (a, shifted_b), (shifted_a, shifted_b)):
            assert torch.equal(plan.run(first, second)[0], 2 * a + b)


def test_an_empty_batch_runs_what_is_left(device):
    a, b = torch.empty(2, 0, 20, device=device)
    plan = _plan_of_sums(a, b)
    assert not plan.launches
    assert plan.run(a, b)[0].shape == (0, 20)


def test_direct_launches_run_on_the_device_and_the_current_stream_of_the_tensors(monkeypatch):
    """Without two GPUs: the driver says that device 0 is the current one, and streams of its own."""
    entered, streams = [], []

    @contextmanager
    def enter(index):
        entered.append(index)
        yield

    def launches_on(stream):
        streams.append(stream)
        return []

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(plan_module, "driver", driver)
    monkeypatch.setattr(torch.cuda, "device", enter)
    for index in (0, 1):
        plan = Plan([], torch.device("cuda", index))
        plan.launch(add_kernel, (1,), (), ())
        plan._direct = SimpleNamespace(places=(), current_stream=lambda index: 70 + index, on=launches_on)
        plan.run()
    assert (entered, streams) == ([1], [70, 71])


def test_outputs_are_filled_with_zeros_where_that_is_asked_for(device):
    a = torch.randn(9, 20, device=device)
    plan = Plan((a,), device)
    out = plan.output((9, 60), torch.float32, zeroed=True)
    _launch_add(plan, plan.given[0], None, channels(out, 20, 40), 3.0)
    expected = torch.zeros(9, 60, device=device)
    expected[:, 20:40] = 3 * a
    for _ in range(2):
        assert torch.equal(plan.run(a)[0], expected)


def test_arrays_of_the_workspace_and_of_what_is_kept_do_not_overlap(device):
    plan = Plan((), device)
    sizes = [((3, 5), torch.float32), ((1,), torch.float16), ((0, 4), torch.float32), ((7,), torch.int32)]
    for take, n_bytes in ((plan.scratch, "workspace_bytes"), (plan.keep, "kept_bytes")):
        end = 0
        for shape, dtype in sizes:
            buffer = take(shape, dtype)
            assert buffer.offset % 128 == 0
            assert buffer.offset >= end
            end = buffer.offset + torch.Size(shape).numel() * dtype.itemsize
        assert getattr(plan, n_bytes) >= end


def test_what_one_plan_keeps_another_reads(device):
    """Arrays of several types and odd sizes, taken in the same order."""
    shapes = [(3, 7), (1, 1), (9, 20)]
    given = [torch.randn(shape, device=device) for shape in shapes]
    writer = Plan(given, device)
    writer.keep((5,), torch.float16)
    for x in writer.given:
        _launch_add(writer, x, None, writer.keep(x.shape, torch.float32), 2.0)
    (kept,) = writer.run(*given)
    assert kept.dtype == torch.uint8

    reader = Plan((kept,), device)
    source = Kept(reader.given[0])
    source.take((5,), torch.float16)
    for shape in shapes:
        _launch_add(reader, source.take(shape, torch.float32), None, reader.output(shape, torch.float32), 0.5)
    for x, out in zip(given, reader.run(kept), strict=True):
        assert torch.equal(x, out)


PLAIN = Settings(16, 2, RegionGrid.of_windows(4, 6, 2), 2, 0.25, 0.25)
SOFT = Settings(16, 2, RegionGrid.of_windows(5, 6, 3), 2, 0.25, 0.25, "soft", True)


def _attention(settings, device, batch=2, dim=24):
    packed_dim = 2 * settings.qk_dim + dim
    shape = (batch, settings.grid.height, settings.grid.width, packed_dim)
    padding = torch.randn(packed_dim, device=device) if settings.grid.is_padded else None
    weight, bias = torch.randn(dim, 1, 3, 3, device=device), torch.randn(dim, device=device)
    qkv = torch.randn(shape, device=device)
    return PackedAttention(qkv, None, padding, None, weight, bias, settings)


BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [PLAIN, SOFT], ids=["plain", "soft"])
def test_what_tracing_takes_for_kept_is_what_is_kept(settings, backend, device):
    problem, kernels = _attention(settings, device), fused_kernels(backend)
    _, saved = kernels.attend(problem, trains=True)
    like = kernels.saved_like(problem)
    assert [(x.shape, x.dtype, x.stride()) for x in saved] == [(x.shape, x.dtype, x.stride()) for x in like]
    assert not kernels.attend(problem, trains=False)[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [PLAIN, SOFT], ids=["plain", "soft"])
def test_a_packed_attention_of_an_empty_batch(settings, backend, device):
    problem = _attention(settings, device, batch=0)
    for trains in (False, True):
        out, _ = fused_kernels(backend).attend(problem, trains)
        assert out.shape == (0, settings.grid.height, settings.grid.width, 24)
