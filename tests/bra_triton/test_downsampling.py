"""Down-sampling of keys and values: positions of cells, the fused and the plain path, gradients, exports."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import relative_error
from torch import nn
from torch._subclasses import FakeTensorMode

from bra_triton import BiLevelRoutingAttention
from bra_triton.cells import fractional_cells
from bra_triton.kernels.grid import RegionGrid
from bra_triton.modules import downsampling
from bra_triton.operators import pooling as operators

BACKENDS = ("torch", "triton")
MODES = {
    "ada_avgpool": {"kv_per_win": 3},
    "ada_maxpool": {"kv_per_win": 3},
    "avgpool": {"ratio": 2},
    "maxpool": {"ratio": 2},
    "fracpool": {"ratio": 1.5},
    "conv": {"ratio": 2, "kernel": 3},
}
QK_DIM, DIM = 2, 4
GRID = RegionGrid.of_windows(7, 9, 2)  # regions of 4 x 5 tokens, a row and a column of padding
SMALL = RegionGrid(3, 5, 4, 5, 1, 1)  # one such region, for tests that run the operators many times
sides = st.integers(1, 40)


def _module(mode):
    return downsampling.build(mode, QK_DIM, DIM, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_that_a_mode_uses(mode):
    names = {"kv_per_win": "kv_per_win", "kv_downsample_ratio": "ratio", "kv_downsample_kernel": "kernel"}
    assert names.keys() == downsampling.USED_BY.keys()
    for name, modes in downsampling.USED_BY.items():
        changed = downsampling.build(mode, QK_DIM, DIM, **{**MODES[mode], names[name]: 5})
        assert (repr(changed) != repr(_module(mode))) == (mode in modes), name


def _packed(device, dtype=torch.float32, grid=GRID):
    """A packed projection `(1, H, W, 2*qk_dim + dim)` and the row that its padding holds."""
    qkv = torch.randn(1, grid.height, grid.width, 2 * QK_DIM + DIM, device=device, dtype=dtype)
    fill = torch.randn(qkv.shape[-1], device=device, dtype=dtype)
    return qkv.requires_grad_(), fill.requires_grad_()


def _plain(module, qkv, fill):
    """The result of the module's plain path, on regions cut from the padded map."""
    bottom, right = GRID.padding
    padded = F.pad(qkv - fill, (0, 0, 0, right, 0, bottom)) + fill
    regions = {"j": GRID.rows, "i": GRID.columns}
    key_value = rearrange(padded[..., QK_DIM:], "n (j h) (i w) c -> (n j i) c h w", **regions)
    return rearrange(module(key_value), "(n j i) c h w -> n (j h) (i w) c", **regions)


class TestCells:
    """Compares the tables with PyTorch's pooling of token numbers, whose maximum is a cell's last token."""

    @staticmethod
    def _covered(cells):
        return {token for start, end in cells.tolist() for token in range(start, end)}

    @given(side=sides, kv_per_win=st.integers(1, 12))
    def test_adaptive_cells_are_pytorchs_and_leave_no_token_out(self, side, kv_per_win):
        module = downsampling.build("ada_avgpool", 1, 1, kv_per_win)
        cells, columns = module.cells(side, side, "cpu")
        assert columns is cells
        token = torch.arange(side, dtype=torch.float64)[None]
        assert torch.equal(cells[:, 1], F.adaptive_max_pool1d(token, kv_per_win)[0].int() + 1)
        assert torch.equal(cells[:, 0], -F.adaptive_max_pool1d(-token, kv_per_win)[0].int())
        assert self._covered(cells) == set(range(side))

    @given(side=sides, ratio=st.integers(2, 8))
    def test_windows_are_pytorchs(self, side, ratio):
        module = downsampling.build("maxpool", 1, 1, ratio=ratio)
        if ratio > side:
            with pytest.raises(ValueError, match="kv_downsample_ratio must be at most a region's side"):
                module.cells(side, side, "cpu")
            return
        cells, _ = module.cells(side, side, "cpu")
        token = torch.arange(side, dtype=torch.float64)[None]
        assert torch.equal(cells[:, 1], F.max_pool1d(token, ratio)[0].int() + 1)
        assert torch.equal(cells[:, 1] - cells[:, 0], torch.full((len(cells),), ratio))

    @given(
        side=sides,
        ratio=st.sampled_from([1, 1.25, 1.5, 2, 2.7, 3, 4]),
        step=st.integers(0, downsampling.SAMPLE_STEPS - 1),
        wider=st.integers(0, 3),
    )
    @settings(max_examples=200)
    def test_fractional_cells_are_pytorchs_and_leave_no_token_out(self, side, ratio, step, wider):
        module = downsampling.build("fracpool", 1, 1, ratio=ratio)
        count = module.count(side)
        window = min(side - count + 1, module.window(side) + wider)  # PyTorch refuses wider ones
        sample = torch.tensor(step / downsampling.SAMPLE_STEPS)
        cells = fractional_cells(side, count, window, sample)
        token = torch.arange(side, dtype=torch.float32)
        ends = F.fractional_max_pool2d(
            token.expand(1, 1, side, side),
            window,
            (count, count),
            _random_samples=sample.expand(1, 1, 2),
        )
        assert torch.equal(cells[:, 1], ends[0, 0, 0].int() + 1)
        assert self._covered(cells) == set(range(side))
        assert (cells.diff(dim=0) >= 0).all()  # kernels need sorted cells

    @given(height=st.integers(3, 40), width=st.integers(3, 40), mode=st.sampled_from(list(MODES)))
    def test_the_grid_of_keys_has_the_cells_that_there_are(self, height, width, mode):
        module = _module(mode)
        rows, columns = module.cells(height, width, "cpu")
        grid = module.kv_grid(RegionGrid.of_region_size(5 * height - 1, 2 * width, (height, width)))
        assert grid == RegionGrid(5 * len(rows), 2 * len(columns), len(rows), len(columns), 5, 2)
        assert (rows[:, 1] - rows[:, 0]).max() <= module.largest(height)
        assert module(torch.zeros(1, QK_DIM + DIM, height, width)).shape[2:] == (len(rows), len(columns))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_fused_and_plain_path_agree_with_every_gradient(mode, backend, device):
    module = _module(mode).to(device)
    qkv, fill = _packed(device)
    inputs = (qkv, fill, *module.parameters())
    torch.manual_seed(0)  # fracpool draws its cells
    expected = _plain(module, qkv, fill)
    torch.manual_seed(0)
    actual = module.pool(qkv, GRID, fill, backend=backend)
    grad = torch.randn_like(expected)
    # Both add tens of float32 terms, in different orders.
    assert torch.allclose(actual, expected, atol=1e-5)
    pairs = zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    )
    assert all(torch.allclose(a, e, atol=1e-5) for a, e in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_fill_the_padding_is_zero(backend, device):
    module = _module("ada_avgpool")
    qkv, fill = _packed(device)
    expected = _plain(module, qkv, torch.zeros_like(fill))
    assert torch.allclose(module.pool(qkv, GRID, backend=backend), expected, atol=1e-5)
    qkv.grad = None
    module.pool(qkv, GRID, backend=backend).sum().backward()
    assert not qkv.grad[..., :QK_DIM].any()


def test_modules_that_pool_alone_differently_share_no_plan(device):
    """Both calls have the same signature, which does not contain the number of keys."""
    arguments = {"num_heads": 1, "n_win": 2, "topk": 2, "kv_downsample_mode": "ada_avgpool"}
    x = torch.randn(1, 4, 4, 16, device=device)
    for kv_per_win in (1, 2):
        module = BiLevelRoutingAttention(16, **arguments, kv_per_win=kv_per_win, backend="triton").to(device)
        out = module(x)
        module.backend = "reference"
        assert relative_error(out, module(x)) < 1e-5


class TestKeptCells:
    """Tables of fixed cells are computed once and kept, unless a later call must not use the same tensor."""

    @pytest.fixture(autouse=True)
    def nothing_kept(self):
        downsampling._kept.clear()

    @pytest.mark.parametrize("mode", ["ada_avgpool", "avgpool", "conv"])
    def test_once_for_a_side_and_the_numbers_of_a_mode(self, mode):
        (first, columns), (again, _) = (_module(mode).cells(8, 8, "cpu") for _ in range(2))
        assert first is columns is again
        assert _module(mode).cells(9, 9, "cpu")[0] is not first
        others = downsampling.build(mode, QK_DIM, DIM, **dict.fromkeys(MODES[mode], 4))
        assert not torch.equal(others.cells(8, 8, "cpu")[0], first)

    def test_what_inference_mode_made_no_backward_gets(self, device):
        module, (qkv, fill) = _module("ada_avgpool").to(device), _packed(device)
        with torch.inference_mode():
            module.pool(qkv, GRID, fill, backend="torch")
        module.pool(qkv, GRID, fill, backend="torch").sum().backward()
        assert qkv.grad is not None

    def test_what_a_dispatch_mode_made_nobody_gets(self):
        with FakeTensorMode():
            _module("conv").cells(8, 8, "cpu")
        assert not downsampling._kept

    def test_another_thread_may_drop_an_entry_at_any_time(self, monkeypatch):
        class Forgetful(dict):
            def __setitem__(self, key, value):
                pass

        expected = _module("conv").cells(8, 8, "cpu")[0]
        monkeypatch.setattr(downsampling, "_kept", Forgetful())
        assert torch.equal(_module("conv").cells(8, 8, "cpu")[0], expected)


class TestFractionalPooling:
    def test_training_draws_anew_and_eval_does_not(self):
        module = _module("fracpool")
        drawn = {tuple(module.cells(20, 20, "cpu")[0].flatten().tolist()) for _ in range(20)}
        assert len(drawn) > 1
        module.eval()
        fixed = {tuple(module.cells(20, 20, "cpu")[0].flatten().tolist()) for _ in range(20)}
        assert len(fixed) == 1

    def test_a_ratio_that_no_float_holds_counts_as_it_is_written(self):
        """11 / 1.1 is 10, although the float 1.1 is a little more than 1.1."""
        assert downsampling.build("fracpool", QK_DIM, DIM, ratio=1.1).count(11) == 10

    def test_rows_and_columns_have_samples_of_their_own(self):
        module = _module("fracpool")
        assert any(not torch.equal(*module.cells(20, 20, "cpu")) for _ in range(20))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_keys_values_regions_and_images_share_the_samples(self, backend, device):
        """All regions and channels hold the same numbers, so their pooled values must be the same, too."""
        module = _module("fracpool")
        grid = RegionGrid.of_windows(22, 22, 2)
        region = torch.rand(11, 11, device=device)
        qkv = region.repeat(2, 2)[None, :, :, None].expand(2, -1, -1, 8).contiguous()
        pooled = module.pool(qkv, grid, backend=backend).unflatten(1, (2, -1)).unflatten(3, (2, -1))
        assert torch.equal(pooled, pooled[:1, :1, :, :1, :, :1].expand_as(pooled))

    def test_a_ratio_of_1_keeps_every_token(self):
        module = downsampling.build("fracpool", QK_DIM, DIM, ratio=1)
        x = torch.randn(2, QK_DIM + DIM, 5, 7)
        assert torch.equal(module(x), x)


class TestConstruction:
    @pytest.mark.parametrize(
        "arguments", [{"mode": "identity"}, {"mode": "avgpool", "ratio": 1}, {"mode": "maxpool", "ratio": 1}]
    )
    def test_nothing_to_reduce_is_identity(self, arguments):
        assert isinstance(downsampling.build(qk_dim=2, dim=4, **arguments), nn.Identity)

    @pytest.mark.parametrize("mode", MODES)
    def test_only_the_convolution_has_parameters(self, mode):
        shapes = {name: tuple(value.shape) for name, value in _module(mode).state_dict().items()}
        convolution = {
            "key.weight": (2, 1, 3, 3),
            "key.bias": (2,),
            "value.weight": (4, 1, 3, 3),
            "value.bias": (4,),
        }
        assert shapes == (convolution if mode == "conv" else {})

    def test_the_convolutions_kernel_is_the_ratio_by_default(self):
        module = downsampling.build("conv", 2, 4, ratio=3)
        assert module.key.kernel_size == module.value.kernel_size == (3, 3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mode": "mean"}, r"kv_downsample_mode must be one of .*'fracpool', 'conv'.*, got 'mean'"),
            ({"mode": "ada_avgpool", "kv_per_win": 0}, "kv_per_win must be an int .*, got 0"),
            (
                {"mode": "ada_maxpool", "kv_per_win": None},
                "kv_per_win must be an int .*, got None",
            ),
            (
                {"mode": "avgpool", "ratio": 0},
                "kv_downsample_ratio must be a finite .*, got 0",
            ),
            ({"mode": "maxpool", "ratio": 1.5}, "kv_downsample_ratio must be a whole number .*, got 1.5"),
            (
                {"mode": "fracpool", "ratio": 0.5},
                "kv_downsample_ratio must be a finite .*, got 0.5",
            ),
            ({"mode": "fracpool", "kernel": 0}, "kv_downsample_kernel must be an int .*, got 0"),
            (
                {"mode": "conv", "ratio": -1},
                "kv_downsample_ratio must be a finite .*, got -1",
            ),
            ({"mode": "conv", "kernel": 0}, "kv_downsample_kernel must be an int .*, got 0"),
        ],
    )
    def test_impossible_arguments_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            downsampling.build(qk_dim=2, dim=4, **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mode": "avgpool", "ratio": 6}, "kv_downsample_ratio must be at most .* 5 tokens, got 6"),
            ({"mode": "conv", "kernel": 6}, "kv_downsample_kernel must be at most .* 5 tokens, got 6"),
            ({"mode": "fracpool", "kernel": 6}, "kv_downsample_kernel must be from 5 to 5 .*, got 6"),
            (
                {"mode": "fracpool", "ratio": 2, "kernel": 2},
                "kv_downsample_kernel must be from 3 to 4 so that 2 different cells cover .*, got 2",
            ),
        ],
    )
    def test_regions_too_small_are_refused_by_both_paths(self, arguments, message):
        module = downsampling.build(qk_dim=2, dim=4, **arguments)
        with pytest.raises(ValueError, match=message):
            module(torch.zeros(1, 6, 5, 5))
        with pytest.raises(ValueError, match=message):
            module.pool(torch.zeros(1, 10, 10, 8), RegionGrid.of_windows(10, 10, 2), backend="torch")


class TestOperator:
    @staticmethod
    def _arguments(mode, backend, device, dtype=torch.float32):
        module = _module(mode).to(device, dtype)
        qkv, fill = _packed(device, dtype, SMALL)
        cells = module.cells(SMALL.region_height, SMALL.region_width, device)
        weight, bias = (
            None if p is None else p.detach().requires_grad_() for p in module.packed_parameters()
        )
        largest = [module.largest(SMALL.region_height), module.largest(SMALL.region_width)]
        return qkv, fill, *cells, weight, bias, largest, QK_DIM, [3, 5, 4, 5, 1, 1], module.mode, backend

    @pytest.mark.parametrize("mode", MODES)
    def test_gradcheck_of_the_torch_backend(self, mode, device):
        arguments = self._arguments(mode, "torch", device, torch.float64)
        places = [0, 1] if arguments[4] is None else [0, 1, 4, 5]

        def pool(*inputs):
            replaced = list(arguments)
            for place, value in zip(places, inputs, strict=True):
                replaced[place] = value
            return operators.pool_regions(*replaced)[0]

        # Random numbers differ by more than gradcheck's step, so a step does not change which is the maximum.
        torch.autograd.gradcheck(pool, [arguments[place] for place in places])

    @pytest.mark.parametrize("mode", ["ada_maxpool", "avgpool", "fracpool", "conv"])
    def test_compiles_to_one_graph(self, mode, device):
        module = _module(mode).to(device).eval()

        def run(qkv):
            grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], 2)
            return module.pool(qkv, grid, backend="torch")

        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(run, fullgraph=True, backend=counter)
        for size in (8, 12, 16, 20):
            qkv = torch.randn(1, size, size + 2, 2 * QK_DIM + DIM, device=device, requires_grad=True)
            expected, actual = run(qkv), compiled(qkv)
            assert torch.allclose(actual, expected)
            grads = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (actual, expected))
            assert torch.allclose(*grads)
        assert counter.frame_count <= 2

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_half_precision_maps_with_float32_weights_under_autocast(self, backend, device):
        module = _module("conv").to(device)
        qkv, fill = _packed(device)
        expected = module.pool(qkv, GRID, fill, backend=backend)
        half, half_fill = qkv.detach().bfloat16().requires_grad_(), fill.detach().bfloat16()
        with torch.autocast(device.type, torch.bfloat16):
            actual = module.pool(half, GRID, half_fill, backend=backend)
        actual.sum().backward()
        assert actual.dtype == half.grad.dtype == torch.bfloat16
        assert module.key.weight.grad.dtype == torch.float32
        assert relative_error(actual, expected.double()) < 1e-2  # bfloat16 keeps 8 bits


@pytest.mark.filterwarnings("ignore")  # traces warn of sizes that become constants
@pytest.mark.parametrize("mode", MODES)
def test_the_plain_path_exports(mode):
    module = _module(mode).eval()
    x = torch.randn(2, QK_DIM + DIM, 4, 5)
    for exported in (torch.jit.trace(module, x), torch.export.export(module, (x,)).module()):
        assert torch.allclose(exported(x), module(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_a_model_with_reduced_keys_exports_to_onnx(mode, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    arguments = {f"kv_downsample_{name}": value for name, value in MODES[mode].items()}
    arguments["kv_per_win"] = arguments.pop("kv_downsample_kv_per_win", 4)
    arguments |= {"kv_downsample_mode": mode, "auto_pad": True, "backend": "reference"}
    module = BiLevelRoutingAttention(8, 2, 2, topk=2, **arguments).eval()
    x = torch.randn(1, 8, 10, 8)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], opset_version=18)
    (actual,) = onnxruntime.InferenceSession(file).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(actual), module(x), atol=1e-5)


@pytest.mark.parametrize(("mode", "keys"), [("fracpool", 3 * 4), ("conv", 2 * 2)])
def test_the_reference_attends_to_the_reduced_keys(mode, keys):
    module = BiLevelRoutingAttention(
        8,
        2,
        2,
        qk_dim=4,
        topk=2,
        kv_downsample_mode=mode,
        kv_downsample_ratio=1.2 if mode == "fracpool" else 2,
        auto_pad=True,
        backend="reference",
    )
    out, _, _, attn_weight = module(torch.randn(1, 7, 10, 8), ret_attn_mask=True)
    assert out.shape == (1, 7, 10, 8)
    assert attn_weight.shape == (4, 2, 20, 2 * keys)
    out.sum().backward()
    if mode == "conv":
        assert {"kv_down.key.weight", "kv_down.value.bias"} <= set(module.state_dict())
        assert module.kv_down.key.weight.grad.any()
