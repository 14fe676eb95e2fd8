"""Pooling of regions, its gradients and its compiled kernels, against PyTorch's own pooling in float64."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import relative_error

from bra_triton.backend import torch as torch_kernels
from bra_triton.bench.machine_code.launches import kernel_name, variant
from bra_triton.bench.machine_code.static_analysis import compile_for, resource_usage
from bra_triton.cells import fractional_cells
from bra_triton.kernels import calls
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.pooling import launch
from bra_triton.kernels.pooling.problem import MAX, RegionPooling
from bra_triton.modules import downsampling

BACKENDS = {"triton": calls, "torch": torch_kernels}
QK_DIM, DIM = 3, 5  # a slice that starts at an odd channel and whose channels fill no block
GRIDS = {
    # Regions of 4 x 5 tokens: the sides differ, no side is a multiple of 3 (cells), one is of 2 (ratio).
    "whole": RegionGrid.of_windows(8, 10, 2),
    # Regions of 3 x 5 tokens, 9 x 15 in all; the last two rows and columns are padding.
    "padded": RegionGrid.of_windows(7, 13, 3),
    "all_padding": RegionGrid(3, 4, 4, 5, 2, 2),  # three regions of four hold no token of the map
}
MODULES = {
    "ada_avgpool": {"kv_per_win": 3},  # cells overlap
    "ada_maxpool": {"kv_per_win": 3},
    "ada_upsampling": {"kv_per_win": 7},  # more cells than tokens
    "avgpool": {"ratio": 2},  # a remainder is dropped
    "maxpool": {"ratio": 2},
    "fracpool": {"ratio": 1.5},
    "conv": {"ratio": 2, "kernel": 3},  # kernels overlap
}
MAX_MODES = ("ada_maxpool", "maxpool", "fracpool")
SAMPLES = (0.25, 0.75)  # along the rows, along the columns


def _module(name, qk_dim=QK_DIM, dim=DIM):
    mode = "ada_avgpool" if name == "ada_upsampling" else name
    return downsampling.build(mode, qk_dim, dim, **MODULES[name])


def _pooling(module, grid, device):
    sides = (grid.region_height, grid.region_width)
    if isinstance(module, downsampling.FractionalMaxPooling):
        cells = [
            fractional_cells(
                side, module.count(side), module.window(side), torch.tensor(sample, device=device)
            )
            for side, sample in zip(sides, SAMPLES, strict=True)
        ]
    else:
        cells = module.cells(*sides, device)
    return RegionPooling(*cells, module.mode, grid)


def _pytorch(module, regions):
    """PyTorch's own pooling of `(B, C, h, w)`."""
    if not isinstance(module, downsampling.FractionalMaxPooling):
        return module(regions)
    sides = regions.shape[-2:]
    samples = torch.tensor(SAMPLES[::-1], dtype=regions.dtype, device=regions.device)
    return F.fractional_max_pool2d(
        regions,
        [module.window(side) for side in sides],
        [module.count(side) for side in sides],
        _random_samples=samples.expand(*regions.shape[:2], 2),
    )


def _expected(module, x, fill, grid):
    """The pooled map, from a map padded with `fill` and cut into regions."""
    bottom, right = grid.padding
    padded = F.pad(x - fill, (0, 0, 0, right, 0, bottom)) + fill
    regions = rearrange(padded, "n (j h) (i w) c -> (n j i) c h w", j=grid.rows, i=grid.columns)
    return rearrange(
        _pytorch(module, regions), "(n j i) c h w -> n (j h) (i w) c", j=grid.rows, i=grid.columns
    )


def _problem(name, grid, device, batch=2, qk_dim=QK_DIM, dim=DIM):
    """Module, packed map and fill, in float64.

    Small whole numbers: every precision holds them, and windows have several equal maxima.
    """
    module = _module(name, qk_dim, dim).double().to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    qkv = torch.randint(-4, 5, (batch, grid.height, grid.width, 2 * qk_dim + dim), device=device).double()
    return module, qkv, torch.randint(-4, 5, (qk_dim + dim,), device=device).double()


def _check(name, grid, backend, dtype, device, tolerance, **sizes):
    """Compares forward and all gradients, for a slice of the packed map, with PyTorch's pooling."""
    module, qkv, fill = _problem(name, grid, device, **sizes)
    pooling = _pooling(module, grid, device)
    qk_dim = module.qk_dim

    x = qkv[..., qk_dim:].clone().requires_grad_()
    fill.requires_grad_()
    expected = _expected(module, x, fill, grid)
    grad_out = torch.randn_like(expected).bfloat16().double()
    module.zero_grad()
    expected.backward(grad_out)

    weight, bias = (None if p is None else p.detach().to(dtype) for p in module.packed_parameters())
    narrow, narrow_fill = qkv.to(dtype), fill.detach().to(dtype)
    pooled, argmax = backend.pool(narrow[..., qk_dim:], narrow_fill, pooling, weight, bias)
    assert pooled.dtype == dtype
    assert pooled.is_contiguous()
    grad_qkv = torch.full_like(narrow, torch.nan)
    grads = backend.pool_backward(
        grad_out.to(dtype),
        narrow[..., qk_dim:],
        narrow_fill,
        argmax,
        pooling,
        weight,
        grad_qkv[..., qk_dim:],
    )
    assert grad_qkv[..., :qk_dim].isnan().all()

    pairs = [(pooled, expected), (grad_qkv[..., qk_dim:], x.grad)]
    if grid.is_padded:
        pairs.append((grads.fill, fill.grad))
    else:
        assert grads.fill is None
    if weight is None:
        assert grads.weight is None
    else:
        pairs += [
            (grads.weight, torch.cat((module.key.weight.grad, module.value.weight.grad)).squeeze(1)),
            (grads.bias, torch.cat((module.key.bias.grad, module.value.bias.grad))),
        ]
    for actual, truth in pairs:
        assert actual.shape == truth.shape
        assert relative_error(actual, truth) < tolerance
    if module.mode == MAX:
        assert torch.equal(pooled.double(), expected)


# Sums of tens of terms in float32, which has 24 bits.
FLOAT32 = 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MODULES)
def test_equals_pytorchs_pooling_forward_and_backward(name, grid, backend, device):
    if grid == "all_padding" and name not in ("ada_avgpool", "fracpool", "conv"):
        pytest.skip("one case a kind of cell is enough")
    _check(name, GRIDS[grid], BACKENDS[backend], torch.float32, device, FLOAT32)


@pytest.mark.parametrize("name", ["ada_avgpool", "maxpool", "conv"])
def test_many_tiles_strips_and_channel_blocks(name, device, monkeypatch):
    """Tiles so small that this map has several tiles, strips and channel blocks, with tails."""
    monkeypatch.setattr(launch, "TILE_BYTES", 1024)
    monkeypatch.setattr(launch, "MAX_BLOCK_CHANNELS", 8)
    monkeypatch.setattr(launch, "MAX_STRIPS", 2)
    calls.forget_plans()
    _check(name, GRIDS["padded"], calls, torch.float32, device, FLOAT32, qk_dim=4, dim=6, batch=1)
    calls.forget_plans()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ada_avgpool", "fracpool", "conv"])
def test_half_precision_rounds_once(name, dtype, backend, device):
    # Inputs are exact and sums are kept in float32, so the only rounding is that of the result.
    _check(name, GRIDS["padded"], BACKENDS[backend], dtype, device, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", MODULES)
def test_torch_backend_in_float64(name, device):
    _check(name, GRIDS["padded"], torch_kernels, torch.float64, device, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAX_MODES)
def test_maxima_of_nan_and_infinities_are_pytorchs(name, backend, device):
    grid = GRIDS["whole"]
    module, qkv, fill = _problem(name, grid, device)
    x = qkv[..., QK_DIM:].float().contiguous()
    x[0, 1, 2], x[0, 5, 7, 1], x[1, 0:4, 0:5] = torch.nan, torch.inf, -torch.inf
    pooling = _pooling(module, grid, device)
    pooled, argmax = BACKENDS[backend].pool(x, None, pooling)
    expected = _expected(module, x, torch.zeros_like(fill).float(), grid)
    assert expected.isnan().any()
    assert (expected == -torch.inf).any()
    assert torch.equal(pooled.nan_to_num(7.5), expected.nan_to_num(7.5))
    # For any values the maximum's index lies in its region: an index out of range would corrupt memory.
    assert ((argmax >= 0) & (argmax < grid.region_tokens)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ada_maxpool", "conv"])
def test_the_same_bits_every_time(name, backend, device):
    grid = GRIDS["padded"]
    module, qkv, fill = _problem(name, grid, device, batch=1)
    pooling = _pooling(module, grid, device)
    weight, bias = (None if p is None else p.detach().float() for p in module.packed_parameters())
    x, fill = torch.randn_like(qkv).float()[..., QK_DIM:], fill.float()

    def run():
        pooled, argmax = BACKENDS[backend].pool(x, fill, pooling, weight, bias)
        grad_x = torch.empty_like(qkv, dtype=torch.float32)[..., QK_DIM:]
        grads = BACKENDS[backend].pool_backward(pooled.sin(), x, fill, argmax, pooling, weight, grad_x)
        return [pooled, grad_x, grads.fill, *(() if weight is None else (grads.weight, grads.bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_an_empty_batch(device):
    grid = GRIDS["padded"]
    module, qkv, fill = _problem("conv", grid, device, batch=0)
    pooling = _pooling(module, grid, device)
    weight, bias = (p.detach().float() for p in module.packed_parameters())
    x, fill = qkv.float()[..., QK_DIM:], fill.float()
    for backend in BACKENDS.values():
        pooled, _ = backend.pool(x, fill, pooling, weight, bias)
        grads = backend.pool_backward(pooled, x, fill, None, pooling, weight, torch.empty_like(x))
        assert pooled.shape == (0, 3 * 1, 3 * 2, QK_DIM + DIM)
        assert not any(grad.any() for grad in (grads.fill, grads.weight, grads.bias))


class TestAnySpans:
    """Cells that no module makes: any spans whose starts and ends ascend, on any grid."""

    spans = st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda span: span[0] < span[1]),
        min_size=1,
        max_size=5,
    ).map(lambda spans: sorted(zip(sorted(s for s, _ in spans), sorted(e for _, e in spans), strict=True)))

    @given(rows=spans, columns=spans, height=st.integers(1, 8), width=st.integers(1, 8), data=st.data())
    # pytest makes a new object of the class for every backend; some versions of hypothesis refuse that.
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_equal_cells_cut_out_one_by_one(self, backend, rows, columns, height, width, data, device):
        side_h, side_w = (max(end for _, end in spans) for spans in (rows, columns))
        grid = RegionGrid.of_region_size(height, width, (side_h, side_w))
        cells = (torch.tensor(spans, dtype=torch.int32, device=device) for spans in (rows, columns))
        mode = data.draw(st.sampled_from(["mean", "max"]))
        pooling = RegionPooling(*cells, mode, grid)
        x = torch.randn(1, height, width, 2, device=device).double().requires_grad_()
        fill = torch.randn(2, device=device).double().requires_grad_()
        bottom, right = grid.padding
        padded = F.pad(x - fill, (0, 0, 0, right, 0, bottom)) + fill
        expected = torch.stack(
            [
                self._reduce(
                    padded[0, j * side_h + a : j * side_h + b, i * side_w + c : i * side_w + d], mode
                )
                for j in range(grid.rows)
                for a, b in rows
                for i in range(grid.columns)
                for c, d in columns
            ]
        ).view(1, grid.rows * len(rows), grid.columns * len(columns), 2)
        expected.backward(grad_out := torch.randn_like(expected).float().double())

        narrow = x.detach().float()
        pooled, argmax = BACKENDS[backend].pool(narrow, fill.detach().float(), pooling)
        grad_x = torch.full_like(narrow, torch.nan)
        grads = BACKENDS[backend].pool_backward(grad_out.float(), narrow, None, argmax, pooling, None, grad_x)
        assert torch.allclose(pooled.double(), expected, atol=1e-5)
        assert torch.allclose(grad_x.double(), x.grad, atol=1e-5)
        if grid.is_padded:
            assert torch.allclose(grads.fill.double(), fill.grad, atol=1e-4)

    @staticmethod
    def _reduce(cell, mode):
        tokens = cell.reshape(-1, 2)
        return tokens.mean(0) if mode == "mean" else tokens.max(0).values


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = {
    "mean": {"pool", "invert_cells", "pool_backward"},
    "max": {"pool", "invert_cells", "pool_backward"},
    "weighted": {"pool", "invert_cells", "pool_backward", "pool_weight_gradient"},
}


def _launches(name, grid, dtype, qk_dim=64, dim=64):
    module = _module(name, qk_dim, dim)
    pooling = _pooling(module, grid, "meta")
    qkv = torch.empty(2, grid.height, grid.width, 2 * qk_dim + dim, dtype=dtype, device="meta")
    fill = qkv.new_empty(qk_dim + dim)
    weight = bias = None
    if name == "conv":
        kernel = module.kernel
        weight, bias = qkv.new_empty(qk_dim + dim, kernel, kernel), fill

    x = qkv[..., qk_dim:]
    pooled = qkv.new_empty(2, pooling.pooled_grid.height, pooling.pooled_grid.width, qk_dim + dim)
    argmax = torch.empty_like(pooled, dtype=torch.int32) if pooling.mode == MAX else None
    inputs = launch.pooling_inputs(x, fill, pooling, weight, bias)
    plans = (
        launch.plan_pool(inputs, pooling),
        launch.plan_pool_backward((*inputs, pooled, argmax, x), pooling),
    )
    return [each for plan in plans for each in plan.launches]


@pytest.mark.compiled
class TestCompiled:
    @pytest.mark.parametrize(
        ("name", "arch"),
        # The convolution's kernels do all that the others do, except that they store no index of a maximum.
        [("ada_avgpool", "sm_90"), ("fracpool", "sm_80"), *(("conv", arch) for arch in ARCHITECTURES)],
    )
    def test_kernels_compile_and_do_not_spill(self, name, arch):
        launches = _launches(name, GRIDS["padded"], torch.float16)
        assert {*map(kernel_name, launches)} == KERNELS[_module(name).mode]
        for each in launches:
            usage = resource_usage(compile_for(each, arch))
            assert usage.spills == 0, (each.name, usage)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("ada_avgpool", torch.float32), ("fracpool", torch.bfloat16), ("conv", torch.float32)],
    )
    def test_other_types_do_not_spill_either(self, name, dtype):
        for each in _launches(name, GRIDS["whole"], dtype):
            usage = resource_usage(compile_for(each, "sm_90"))
            assert usage.spills == 0, (each.name, usage)

    @pytest.mark.parametrize("name", ["ada_avgpool", "fracpool", "conv"])
    def test_tokens_are_loaded_16_bytes_at_a_time(self, name):
        """Strides must be compile-time numbers: otherwise loads are 2 bytes wide."""
        for each in _launches(name, GRIDS["padded"], torch.float16):
            if kernel_name(each) == "invert_cells":
                continue
            sass = compile_for(each, "sm_90").sass
            assert "LDG.E.128" in sass, each.name
            assert "LDG.E.U16" not in sass, each.name

    @pytest.mark.parametrize("name", ["ada_avgpool", "fracpool", "conv"])
    def test_another_size_compiles_nothing_anew(self, name):
        small, large = (
            _launches(name, RegionGrid.of_windows(*size), torch.float16) for size in ((7, 13, 3), (31, 47, 2))
        )
        assert [*map(variant, small)] == [*map(variant, large)]
