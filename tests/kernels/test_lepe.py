"""LePE against PyTorch's convolution in float64 on the map with its padding written out."""

import dataclasses
from dataclasses import dataclass

import planned
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from problems import relative_error
from torch import Tensor

from bra_triton.backend.torch import lepe as torch_lepe
from bra_triton.kernels.attention.finish import finish_gradients_kernel
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lepe import launch as triton_lepe
from bra_triton.kernels.lepe.arguments import LepeParts, LepeSums, LepeSumsConfig
from bra_triton.kernels.lepe.convolution import convolve_tile
from bra_triton.kernels.problem import Lepe

BACKENDS = ("torch", "triton")
HALVES = (torch.float16, torch.bfloat16)
# Float32 sums of at most a few hundred products, each rounded at 6e-8; errors partly cancel.
FLOAT32_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """One convolution: side, channels, map and regions."""

    name: str
    why: str
    kernel: int
    dim: int
    grid: RegionGrid
    bias: bool = True
    batch: int = 1


CASES = [
    Case("k3", "an odd map with a single region", 3, 16, RegionGrid.of_windows(5, 7, 1)),
    Case("k5", "BiFormer's side_dwconv", 5, 32, RegionGrid.of_windows(8, 8, 4), bias=False),
    Case("k1", "a 1 x 1 kernel: one factor per channel", 1, 16, RegionGrid.of_windows(6, 4, 4)),
    Case("k7", "wider than the map in both directions", 7, 16, RegionGrid.of_windows(3, 2, 2)),
    Case("k3_padded", "padding of as much as the convolution sees", 3, 32, RegionGrid.of_windows(7, 7, 4)),
    Case(
        "k5_padded",
        "padding narrower than k // 2, so that the padded map's edge counts too",
        5,
        32,
        RegionGrid.of_windows(7, 7, 4),
        bias=False,
    ),
    Case(
        "whole_regions_padded",
        "padding wider than k // 2: some of it is seen by no token of the map",
        5,
        16,
        RegionGrid(5, 4, 3, 3, 4, 3),
    ),
    Case(
        "padded_right", "rows end at the map, columns do not", 3, 16, RegionGrid.of_region_size(6, 5, (3, 4))
    ),
    Case(
        "tiles",
        "several token tiles and channel blocks, the last ones not full; two images",
        3,
        40,
        RegionGrid.of_windows(9, 15, 4),
        batch=2,
    ),
    Case("dim_20", "channels not aligned to 16 bytes", 5, 20, RegionGrid.of_windows(6, 6, 4)),
    Case("dim_72", "aligned, but no power of two", 3, 72, RegionGrid.of_windows(4, 3, 1)),
    Case("one_token", "every neighbour is padding or nothing", 3, 16, RegionGrid(1, 1, 2, 2, 1, 1)),
]
case_and_backend = pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(case, backend, id=f"{case.name}-{backend}") for case in CASES for backend in BACKENDS],
)


@dataclass(frozen=True)
class Data:
    """Inputs as float64 values that float16 and bfloat16 hold exactly."""

    attention: Tensor
    packed: Tensor
    weight: Tensor
    bias: Tensor | None
    fill: Tensor | None
    grad_out: Tensor
    packed_grad: Tensor

    def lepe(self, case: Case, dtype: torch.dtype, device: torch.device) -> Lepe:
        def to(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, dtype)

        value = self.packed.to(device, dtype)[..., -case.dim :]
        return Lepe(value, self.weight.to(device, dtype), to(self.bias), case.grid, to(self.fill))


def make(case: Case) -> Data:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().double()

    shape = (case.batch, case.grid.height, case.grid.width)
    return Data(
        attention=random(*shape, case.dim),
        # The gradient is packed more widely than the values, so that their strides cannot be confused.
        packed=random(*shape, 2 * case.dim),
        weight=random(case.dim, 1, case.kernel, case.kernel),
        bias=random(case.dim) if case.bias else None,
        # Shifted by 2, so that a kernel cannot mistake values for the fill or the fill for values.
        fill=2 + random(case.dim) if case.grid.is_padded else None,
        grad_out=random(*shape, case.dim),
        packed_grad=random(*shape, 3 * case.dim),
    )


def truth(case: Case, data: Data) -> dict[str, Tensor]:
    """Output and gradients in float64: the padded map written out, PyTorch's convolution, autograd."""
    value = data.packed[..., -case.dim :].clone().requires_grad_()
    leaves = {"value": value, "weight": data.weight.clone().requires_grad_()}
    for name, leaf in (("bias", data.bias), ("fill", data.fill)):
        if leaf is not None:
            leaves[name] = leaf.clone().requires_grad_()
    bottom, right = case.grid.padding
    padded = F.pad(value, (0, 0, 0, right, 0, bottom))
    if bottom or right:
        in_map = torch.zeros(padded.shape[1:3], dtype=torch.bool)
        in_map[: case.grid.height, : case.grid.width] = True
        padded = torch.where(in_map[..., None], padded, leaves["fill"])
    lepe = F.conv2d(
        padded.permute(0, 3, 1, 2),
        leaves["weight"],
        leaves.get("bias"),
        padding=case.kernel // 2,
        groups=case.dim,
    ).permute(0, 2, 3, 1)
    out = data.attention + lepe[:, : case.grid.height, : case.grid.width]
    grads = torch.autograd.grad(out, list(leaves.values()), data.grad_out)
    result = {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
    result["value"] = result["value"] + data.packed_grad[..., -case.dim :]
    return result


def run_triton(
    attention: Tensor, lepe: Lepe, grad_out: Tensor, grad_value: Tensor, needs_weight_grad: bool = True
) -> tuple[Tensor, LepeSums]:
    """Output, and float32 gradients of the parameters; the values' gradient is added to `grad_value`."""
    out = torch.full_like(attention, torch.nan)
    planned.run(triton_lepe.launch_lepe, attention, lepe, out)

    def add(plan, grad_out, grad_value, lepe):
        def like(x):
            return None if x is None else plan.output(x.shape, torch.float32)

        weight, bias = (like(x) if needs_weight_grad else None for x in (lepe.weight, lepe.bias))
        sums = LepeSums(weight, bias, like(lepe.fill))
        return planned.lepe_gradient(plan, grad_out, grad_value, lepe, sums, adds_to_grad=True)

    return out, planned.run(add, grad_out, grad_value, lepe)


def run(case: Case, data: Data, backend: str, dtype: torch.dtype, device: torch.device, **options):
    """Output and gradients of a backend, on the CPU, and the packed gradient that it wrote into."""
    lepe, attention = data.lepe(case, dtype, device), data.attention.to(device, dtype)
    packed_grad = data.packed_grad.to(device, dtype, copy=True)
    grad_out, grad_value = data.grad_out.to(device, dtype), packed_grad[..., -case.dim :]
    if backend == "triton":
        out, grads = run_triton(attention, lepe, grad_out, grad_value, **options)
    else:
        out = torch_lepe.lepe_forward(attention, lepe)
        grads = torch_lepe.lepe_backward(grad_out, grad_value, lepe, **options)
    result = {"out": out, "value": grad_value, "weight": grads.weight, "bias": grads.bias, "fill": grads.fill}
    return {name: x.cpu() for name, x in result.items() if x is not None}, packed_grad.cpu()


@case_and_backend
def test_float32_matches_float64(case, backend, device):
    data = make(case)
    expected = truth(case, data)
    actual, packed_grad = run(case, data, backend, torch.float32, device)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.shape == expected[name].shape, name
        assert relative_error(x, expected[name]) < FLOAT32_TOLERANCE, name
    untouched = slice(0, -case.dim)
    assert torch.equal(packed_grad[..., untouched], data.packed_grad[..., untouched].float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["k3", "k5_padded", "dim_20"])
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(name, dtype, device, monkeypatch):
    case = next(case for case in CASES if case.name == name)
    data = make(case)
    expected = truth(case, data)
    actual, _ = run(case, data, "triton", dtype, device)
    monkeypatch.setattr(torch_lepe, "_in_float32", lambda x: x)  # the torch backend is more exact on a CPU
    pytorch, _ = run(case, data, "torch", dtype, device)
    for key, x in actual.items():
        assert x.dtype == (dtype if key in ("out", "value") else torch.float32), key
        # PyTorch's error may be 0 by chance, so an error within float32's tolerance is always allowed.
        bound = max(2 * relative_error(pytorch[key], expected[key]), FLOAT32_TOLERANCE)
        assert relative_error(x, expected[key]) <= bound, key


@pytest.mark.parametrize("name", ["k3", "whole_regions_padded"])
def test_torch_backend_takes_float64(name, device):
    case = next(case for case in CASES if case.name == name)
    data = make(case)
    expected = truth(case, data)
    actual, _ = run(case, data, "torch", torch.float64, device)
    for key, x in actual.items():
        assert x.dtype == torch.float64, key
        assert relative_error(x, expected[key]) < 1e-14, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["k3", "k3_padded"])
def test_frozen_weights_change_no_other_gradient(name, backend, device):
    case = next(case for case in CASES if case.name == name)
    data = make(case)
    expected, _ = run(case, data, backend, torch.float32, device)
    actual, _ = run(case, data, backend, torch.float32, device, needs_weight_grad=False)
    assert actual.keys() == expected.keys() - {"weight", "bias"}
    for key, x in actual.items():
        assert torch.equal(x, expected[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend, device):
    case = Case("seven images", "", 3, 16, RegionGrid.of_windows(5, 5, 2), batch=7)
    data = make(case)
    first, _ = run(case, data, backend, torch.float32, device)
    second, _ = run(case, data, backend, torch.float32, device)
    assert all(torch.equal(first[key], second[key]) for key in first)
    # The comparison can fail: with the images reversed the same numbers are added in another order.
    reversed_images = dataclasses.replace(
        data,
        **{name: getattr(data, name).flip(0) for name in ("attention", "packed", "grad_out", "packed_grad")},
    )
    third, _ = run(case, reversed_images, backend, torch.float32, device)
    assert not torch.equal(first["weight"], third["weight"])
    assert relative_error(third["weight"], first["weight"].double()) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_none(backend, device):
    case = Case("empty", "no image", 3, 16, RegionGrid.of_windows(5, 5, 2), batch=0)
    actual, _ = run(case, make(case), backend, torch.float32, device)
    assert actual["out"].shape == (0, 5, 5, 16)
    assert all(not actual[key].any() for key in ("weight", "bias", "fill"))


@triton.jit
def _convolve_some_tokens(
    parts, rows, columns, out, height, width, padded_height, padded_width, n_tokens,
    DIM: tl.constexpr, STRIDE: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    index, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    live = index < n_tokens
    row, column = tl.load(rows + index), tl.load(columns + index)
    lepe = convolve_tile(
        parts, 0, row, column, (height, width, padded_height, padded_width), channel, live,
        channel < DIM, STRIDE, KERNEL,
    )  # fmt: skip
    tl.store(out + index[:, None] * BLOCK_V + channel[None, :], lepe)


@pytest.mark.parametrize("padded", [False, True])
def test_convolve_tile_takes_tokens_in_any_order_and_leaves_dead_ones_alone(padded, device):
    grid = RegionGrid.of_windows(5, 6, 4) if padded else RegionGrid.of_windows(5, 6, 1)
    case = Case("tile", "", 3, 5, grid)
    data = make(case)
    lepe = data.lepe(case, torch.float32, device)
    expected = truth(case, data)["out"][0] - data.attention[0]
    position = torch.randperm(30)[:16].int()
    rows, columns = position // 6, position % 6
    n_tokens = 11
    out = torch.full((16, 8), torch.nan, device=device)
    _convolve_some_tokens[(1,)](
        LepeParts.of(lepe), rows.to(device), columns.to(device), out,
        5, 6, 5 + grid.padding[0], 6 + grid.padding[1], n_tokens,
        DIM=5, STRIDE=lepe.value.stride(2), KERNEL=3, BLOCK_M=16, BLOCK_V=8,
    )  # fmt: skip
    live = slice(0, n_tokens)
    wanted = expected[rows[live].long(), columns[live].long()]
    assert relative_error(out[live, :5].cpu(), wanted) < FLOAT32_TOLERANCE
    # Dead tokens read no value, although they lie in the map; dead channels read none of another token.
    assert torch.equal(out[n_tokens:, :5], lepe.bias.expand(16 - n_tokens, -1))
    assert not out[:, 5:].any()


@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    region=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    extra=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    half=st.integers(0, 3),
)
def test_reach_is_what_the_convolution_sees(sides, region, extra, half):
    counts = [-(-side // r) + more for side, r, more in zip(sides, region, extra, strict=True)]
    grid = RegionGrid(*sides, *region, *counts)
    kernel = 2 * half + 1
    fill = torch.empty(1) if grid.is_padded else None
    lepe = Lepe(torch.empty(1, *sides, 1), torch.empty(1, 1, kernel, kernel), None, grid, fill)
    for side, added, reach in zip(sides, grid.padding, lepe.reach, strict=True):
        seen = {t + step for t in range(side) for step in range(-half, half + 1)} & set(range(side + added))
        assert max(seen) + 1 == reach


def test_a_column_of_any_stride(device):
    """PyTorch calls a map of one column contiguous for any stride of columns, but kernels use this stride."""
    case = Case("column", "", 3, 16, RegionGrid.of_windows(8, 1, 1))
    column = torch.randn(1, 1, 8, 16, device=device).transpose(1, 2)
    assert column.is_contiguous()
    assert column.stride(2) != column.shape[3]
    weight, bias = torch.randn(16, 1, 3, 3, device=device), torch.randn(16, device=device)
    results = []
    for value in (column, column.clone(memory_format=torch.contiguous_format).view(1, 8, 1, 16)):
        lepe = Lepe(value, weight, bias, case.grid)
        grad_value = torch.zeros(1, 1, 8, 16, device=device).transpose(1, 2)
        attention = torch.zeros(1, 8, 1, 16, device=device)
        out, gradients = run_triton(attention, lepe, torch.ones_like(attention), grad_value)
        results.append((out, grad_value, gradients.weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", ["weight bias fill", "weight bias", "weight", "bias fill", "fill"])
@pytest.mark.parametrize(("kernel", "n_programs", "dim"), [(3, 1, 16), (3, 300, 20), (5, 7, 40), (5, 600, 5)])
def test_the_programs_shares_are_summed_and_rounded_once(kernel, n_programs, dim, wanted, dtype, device):
    """Up to three steps of 256 programs; the last block of channels is not full; each tap has a row."""
    taps, names = kernel * kernel, wanted.split()
    has_taps = "weight" in names or "bias" in names
    rows = (taps + 1 if has_taps else 0) + ("fill" in names)
    partials = torch.randn(n_programs, rows, dim, device=device)
    shapes = {"weight": (dim, 1, kernel, kernel), "bias": (dim,), "fill": (dim,)}
    sums = LepeSums(
        **{
            name: torch.full(
                shape, torch.nan, device=device, dtype=torch.float32 if name == "fill" else dtype
            )
            if name in names
            else None
            for name, shape in shapes.items()
        }
    )
    config = LepeSumsConfig(dim, taps, rows, has_taps, 256, 16, HAS_PIECES=False)
    n_sums = rows * -(-dim // 16)
    sizes = (*(1,) * 5, n_programs, n_sums)
    finish_gradients_kernel[(n_sums,)](None, None, partials, sums, *sizes, CONFIG=None, SUMS=config)
    exact = partials.double().sum(0)
    if "weight" in names:
        assert_rounded_once(sums.weight, exact[:taps].T.reshape(shapes["weight"]), n_programs)
    if "bias" in names:
        assert_rounded_once(sums.bias, exact[taps], n_programs)
    if "fill" in names:
        assert_rounded_once(sums.fill, exact[-1], n_programs)


def assert_rounded_once(actual: Tensor, exact: Tensor, n_terms: int) -> None:
    """Checks sums of normally distributed terms: 600 err by 3e-5 in float32; a lost term is about 1."""
    unit = torch.finfo(actual.dtype).eps / 2
    assert torch.allclose(actual.double(), exact, rtol=unit, atol=3e-6 * n_terms**0.5)


def test_the_values_gradient_is_written_or_added(device):
    """LePE's backward writes every element if it runs before dK/dV, and adds if it runs after dK/dV."""
    case = next(case for case in CASES if case.name == "k5_padded")
    data = make(case)
    lepe, grad_out = data.lepe(case, torch.float32, device), data.grad_out.float().to(device)
    before = torch.randn(grad_out.shape, device=device)
    written, added = torch.full_like(before, torch.nan), before.clone()
    for grad_value, adds in ((written, False), (added, True)):
        planned.run(planned.lepe_gradient, grad_out, grad_value, lepe, LepeSums(None, None, None), adds)
    assert torch.allclose(before + written, added, atol=1e-6)
