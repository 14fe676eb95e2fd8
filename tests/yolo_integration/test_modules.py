"""The blocks as modules: shapes, layouts, what they compute, and that they train."""

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import C2PSA, C3k2

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.kernels.grid import RegionGrid
from bra_triton.modules.base import Attention
from bra_triton.yolo_integration import (
    C2BRA,
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    C3k2BRA,
    NCHWBiLevelRoutingAttention2d,
    default_num_heads,
    modules,
    set_backend,
)

BLOCKS = {
    "attention": lambda: BiLevelRoutingAttention2d(32, {"topk": 2, "n_win": 4}),
    "nchw": lambda: NCHWBiLevelRoutingAttention2d(32, {"topk": 2, "n_win": 4}),
    "biformer": lambda: BiFormerBlock(32, {"topk": 2, "n_win": 4}),
    "c2bra": lambda: C2BRA(32, 32, 2, {"topk": 2, "n_win": 4}),
    "c3k2bra": lambda: C3k2BRA(32, 32, 2, {"topk": 2, "n_win": 4}),
}
block_names = pytest.mark.parametrize("name", BLOCKS)


@pytest.mark.parametrize(
    ("dim", "heads"), [(16, 1), (32, 1), (64, 2), (48, 2), (96, 3), (80, 2), (88, 4), (256, 8), (384, 12)]
)
def test_heads_are_as_close_to_32_channels_as_the_divisors_allow(dim: int, heads: int) -> None:
    assert default_num_heads(dim) == heads
    assert BiLevelRoutingAttention2d(dim).attn.spec.num_heads == heads
    assert NCHWBiLevelRoutingAttention2d(dim).attn.spec.num_heads == heads


def test_heads_divide_queries_and_values() -> None:
    assert default_num_heads(96, qk_dim=64) == 4  # values 24 wide, queries 16
    assert BiFormerBlock(96, {"qk_dim": 64}).attn.spec.num_heads == 4


@pytest.mark.parametrize(
    ("build", "at_736"),
    [(BiFormerBlock, 0.15), (BiLevelRoutingAttention2d, 0.15), (NCHWBiLevelRoutingAttention2d, 0.27)],
)
def test_regions_pad_little_at_the_usual_sizes_of_images(build, at_736: float) -> None:
    def most_padding(attention: nn.Module, sizes: list[int]) -> float:
        sides = [size // stride for size in sizes for stride in (8, 16, 32)]
        is_nchw = isinstance(attention, NCHWBiLevelRoutingAttention)
        shapes = [(1, 32, side, side) if is_nchw else (1, side, side, 32) for side in sides]
        return max(attention.grid(torch.empty(shape)).share_of_padding for shape in shapes)

    by_default = build(32).attn
    assert most_padding(by_default, [320, 480, 640, 800, 960]) == 0
    assert most_padding(by_default, [736]) == pytest.approx(at_736, abs=0.005)
    assert build(32, {"n_win": 7}).attn.spec.n_win == 7


@pytest.mark.parametrize(
    "build",
    [
        BiFormerBlock,
        BiLevelRoutingAttention2d,
        lambda dim, arguments: C2BRA(dim, dim, 1, arguments, e=1.0),
        lambda dim, arguments: C3k2BRA(dim, dim, 1, arguments, e=1.0),
    ],
    ids=["biformer", "attention", "c2bra", "c3k2bra"],
)
def test_much_padding_is_warned_of_once_in_training(build, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(modules.LOGGER, "warning", warnings.append)
    modules._warn_of_padding.cache_clear()
    block = build(8, {"n_win": 7})
    block.eval()(torch.randn(1, 8, 8, 8))  # as Ultralytics does to find the strides
    block.train()(torch.randn(1, 8, 20, 20))  # 9 % are padding
    assert warnings == []
    for _ in range(2):
        block(torch.randn(1, 8, 8, 8))
    (warning,) = warnings
    assert warning.startswith("67% of the tokens attended to are padding: 7 x 7 regions on a map of 8 x 8")
    assert "With n_win: 4 it would be 0%" in warning
    block(torch.randn(1, 8, 10, 13))
    assert "With n_win: [5, 7] it would be 7%" in warnings[1]
    build(8, {"n_win": [5, 7]}).train()(torch.randn(1, 8, 10, 13))
    assert len(warnings) == 2
    build(8, {"n_win": 7, "topk": 20}).train()(torch.randn(1, 8, 12, 12))
    assert "With n_win: 6 it would be 0%" in warnings[2]  # not 4: 16 regions are fewer than topk
    assert warnings[2].endswith("; or choose another imgsz")
    for n_win, side in ((3, 2), (7, 2), (5, 3)):  # n_win=4 would leave 75 % or 44 % padding
        build(8, {"n_win": n_win, "topk": 1}).train()(torch.randn(1, 8, side, side))
        assert warnings[-1].endswith(f" regions on a map of {side} x {side}. Choose another imgsz")
    assert len(warnings) == 6


def test_much_padding_of_the_nchw_form_is_warned_of_by_its_own_regions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its regions are `H // n_win` tokens high, and there may be more than `n_win` of them along a side."""
    warnings: list[str] = []
    monkeypatch.setattr(modules.LOGGER, "warning", warnings.append)
    modules._warn_of_padding.cache_clear()
    block = NCHWBiLevelRoutingAttention2d(8, {"n_win": 5})
    block.eval()(torch.randn(1, 8, 31, 31))
    block.train()(torch.randn(1, 8, 29, 29))  # 6 x 6 regions of 5 x 5 tokens: 7 % are padding
    assert warnings == []
    for _ in range(2):
        block(torch.randn(1, 8, 31, 31))
    (warning,) = warnings
    assert warning.startswith("26% of the tokens attended to are padding: 6 x 6 regions on a map of 31 x 31")
    assert "With n_win: 7 it would be 6%" in warning
    NCHWBiLevelRoutingAttention2d(8, {"n_win": 7}).train()(torch.randn(1, 8, 31, 31))
    assert len(warnings) == 1
    # The NHWC form cuts the same map into 5 x 5 regions of 7 x 7 tokens.
    BiLevelRoutingAttention2d(8, {"n_win": 5}).train()(torch.randn(1, 8, 31, 31))
    assert warnings[1].startswith("22% of the tokens attended to are padding: 5 x 5 regions")
    NCHWBiLevelRoutingAttention2d(8, {"n_win": 4}).train()(torch.randn(1, 8, 13, 26))
    assert "With n_win: [5, 6] it would be 14%" in warnings[2]  # not 7: 13 x 13 regions of one row


@pytest.mark.parametrize("build", [BiLevelRoutingAttention2d, NCHWBiLevelRoutingAttention2d])
def test_a_map_that_the_attention_refuses_is_refused_in_training_with_the_same_error(build) -> None:
    block = build(8, {"auto_pad": False, "n_win": 5})
    for shape in ((1, 8, 4, 4), (1, 8, 0, 6), (1, 6, 10, 10), (8, 10, 10)):
        with pytest.raises((ValueError, RuntimeError)) as in_eval:
            block.eval()(torch.randn(shape))
        with pytest.raises(type(in_eval.value)) as in_training:
            block.train()(torch.randn(shape))
        assert str(in_training.value) == str(in_eval.value)


@pytest.mark.parametrize(
    ("grid_of", "advised"),
    [(RegionGrid.of_windows, [5, 4, 4, 5, 7, 4]), (RegionGrid.of_nchw, [5, 5, 4, 5, 6, 5])],
    ids=["nhwc", "nchw"],
)
def test_an_advised_n_win_pads_little_at_every_size(grid_of: modules.GridOf, advised: list[int]) -> None:
    sides = {size // stride for size in range(320, 1281, 32) for stride in (8, 16, 32)}
    grids = [grid_of(side, side, (modules._advised_n_win(grid_of, side, 1),) * 2) for side in sides]
    assert 0.1 < max(grid.share_of_padding for grid in grids) < 0.16
    assert max(grid.rows for grid in grids) <= 8
    assert [modules._advised_n_win(grid_of, side, 1) for side in (10, 12, 16, 20, 21, 24)] == advised


def test_given_heads_are_kept() -> None:
    assert BiFormerBlock(64, {"num_heads": 4}).attn.spec.num_heads == 4


@block_names
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (3, 5), (1, 1)])
def test_maps_of_any_size_keep_their_shape_and_every_parameter_learns(
    name: str, size: tuple[int, int]
) -> None:
    block = BLOCKS[name]()
    x = torch.randn(2, 32, *size, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert x.grad is not None
    unlearned = [key for key, value in block.named_parameters() if value.grad is None]
    assert unlearned == []


@block_names
def test_memory_layout_does_not_change_the_result(name: str) -> None:
    block = BLOCKS[name]().eval()
    x = torch.randn(2, 32, 9, 10)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))


def test_wrapper_computes_the_drop_in_without_a_copy_of_channels_last_maps() -> None:
    wrapper = BLOCKS["attention"]().eval()
    seen = []
    wrapper.attn.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    out = wrapper(x)
    assert seen[0].data_ptr() == x.data_ptr()
    assert seen[0].is_contiguous()
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.permute(0, 2, 3, 1), wrapper.attn(x.permute(0, 2, 3, 1)))


def test_nchw_wrapper_computes_the_nchw_drop_in_by_default_on_maps_of_any_size() -> None:
    wrapper = BLOCKS["nchw"]().eval()
    assert wrapper.attn.auto_pad is True
    x = torch.randn(2, 32, 9, 10)
    out = wrapper(x)
    torch.testing.assert_close(out, wrapper.attn(x))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not torch.allclose(out, BLOCKS["attention"]()(x))


def test_biformer_block_is_position_convolution_attention_and_mlp_each_added() -> None:
    block = BLOCKS["biformer"]().eval()
    x = torch.randn(2, 32, 8, 8)
    expected = (x + block.pos_embed(x)).permute(0, 2, 3, 1)
    expected = expected + block.attn(block.norm1(expected))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected.permute(0, 3, 1, 2))
    assert block.mlp[0].out_features == 3 * 32
    assert {"mlp.0.weight", "mlp.2.weight"} <= block.state_dict().keys()  # checkpoints have these names


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_biformer_block_lays_the_map_out_channels_last_once_for_all(
    memory_format: torch.memory_format,
) -> None:
    block = BLOCKS["biformer"]().eval()
    seen = []
    for norm in (block.norm1, block.norm2):
        norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].is_contiguous()))
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=memory_format)
    assert block(x).is_contiguous(memory_format=torch.channels_last)
    assert seen == [True, True]


@pytest.mark.parametrize("kind", [C2BRA, C3k2BRA])
def test_stages_may_change_the_width(kind: type[C2BRA] | type[C3k2BRA]) -> None:
    block = kind(32, 48, 1, {"topk": 2, "n_win": 4})
    assert block(torch.randn(1, 32, 8, 8)).shape == (1, 48, 8, 8)


def test_c2bra_differs_from_c2psa_in_the_attention_alone() -> None:
    ours, stock = (
        {key: value.shape for key, value in block.state_dict().items() if ".attn." not in key}
        for block in (C2BRA(128, 128, 2), C2PSA(128, 128, 2))
    )
    assert ours == stock


def test_c3k2bra_differs_from_c3k2_in_the_attention_alone() -> None:
    ours, stock = (
        {key: value.shape for key, value in block.state_dict().items() if ".attn." not in key}
        for block in (C3k2BRA(96, 128, 2, e=0.25), C3k2(96, 128, 2, attn=True, e=0.25))
    )
    assert ours == stock
    assert "m.1.1.attn.attn.qkv.qkv.weight" in C3k2BRA(96, 128, 2).state_dict()


def test_c3k2bra_is_a_bottleneck_and_an_attention_block_after_another() -> None:
    block = BLOCKS["c3k2bra"]().eval()
    x = torch.randn(2, 32, 9, 10)
    parts = list(block.cv1(x).chunk(2, dim=1))
    for bottleneck, attention in block.m:
        parts.append(attention(bottleneck(parts[-1])))
    expected = block.cv2(torch.cat(parts, dim=1))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.forward_split(x), expected)  # Ultralytics' exports call this


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda value: BiFormerBlock(64, mlp_ratio=value), "mlp_ratio must be a number .* of 64 channels"),
        (lambda value: C2BRA(64, 32, e=value), "e must be a number .* of 32 channels"),
        (lambda value: C3k2BRA(64, 32, e=value), "e must be a number .* of 32 channels"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 0.001, float("nan"), float("inf"), True, None, "1"])
def test_ratios_that_leave_no_channels_are_refused(build, message: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{message}, got {value!r}$"):
        build(value)


@pytest.mark.parametrize("build", [C2BRA, C3k2BRA])
def test_a_block_without_inner_blocks_is_refused(build) -> None:
    """It would have no attention, and would ignore whatever is given for it."""
    with pytest.raises(ValueError, match="n must be an int of at least 1, got 0"):
        build(32, 32, 0, {"nonesuch": 1})


@pytest.mark.parametrize(
    ("dim", "qk_dim", "name"), [(0, None, "dim"), (32.0, None, "dim"), (32, -4, "qk_dim"), (32, 0, "qk_dim")]
)
def test_numbers_of_heads_need_whole_channels(dim: int, qk_dim: int | None, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be an int of at least 1, got"):
        default_num_heads(dim, qk_dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@block_names
def test_half_precision_model_and_scaled_training_in_autocast(name: str, dtype: torch.dtype) -> None:
    """As Ultralytics trains with `amp=True` and predicts with `half=True`, which it does only on a GPU."""
    # With one region half precision cannot choose other regions.
    block = BLOCKS[name]()
    for attention in block.modules():
        if isinstance(attention, Attention):
            attention.topk, attention.n_win = 1, 1
    parameters, x = list(block.parameters()), torch.randn(2, 32, 9, 10)
    expected = torch.autograd.grad(block(x).square().mean(), parameters)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(parameters)
    with torch.autocast("cpu", dtype):
        loss = block(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    # All gradients together: a bias before a BatchNorm has a gradient of 0, which is only rounding.
    actual, expected = (
        torch.cat([x.flatten() for x in gradients]) for gradients in ([x.grad for x in parameters], expected)
    )
    tolerance = 8 * torch.finfo(dtype).eps  # the roundings of several layers
    assert (actual - expected).norm() < tolerance * expected.norm()
    block.eval()
    with torch.no_grad():
        out = block(x)
        half = block.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert (half - out).norm() < tolerance * out.norm()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "c3k2bra"])
@pytest.mark.parametrize("training", [True, False])
def test_torch_fx_traces_a_block_with_the_attention_as_a_leaf(name: str, training: bool) -> None:
    """Not `C3k2BRA`: `torch.fx` cannot trace Ultralytics' `C2f`, from which it is derived."""
    block = BLOCKS[name]().train(training)
    traced = torch.fx.symbolic_trace(block)
    assert any(target.endswith("attn") for target in (str(node.target) for node in traced.graph.nodes))
    x = torch.randn(2, 32, 9, 10)
    torch.testing.assert_close(traced(x), block(x))


@block_names
def test_trace_serves_new_inputs(name: str) -> None:
    block = BLOCKS[name]().eval()
    with torch.no_grad():
        traced = torch.jit.trace(block, torch.randn(1, 32, 9, 10))
        x = torch.randn(1, 32, 9, 10)
        torch.testing.assert_close(traced(x), block(x))


def test_set_backend_reaches_every_attention() -> None:
    model = nn.Sequential(*(build() for build in BLOCKS.values()))
    set_backend(model, "reference")
    kinds = (BiLevelRoutingAttention, NCHWBiLevelRoutingAttention)
    attentions = [module for module in model.modules() if isinstance(module, kinds)]
    assert [module.backend for module in attentions] == ["reference"] * 7
    model.eval()
    x = torch.randn(1, 32, 8, 8)
    by_reference = model(x)
    set_backend(model, "auto")
    torch.testing.assert_close(model(x), by_reference, atol=1e-5, rtol=1e-5)


@block_names
def test_settings_of_the_attention_cannot_be_set_on_the_block(name: str) -> None:
    """A block is what `model.model[11]` of a `YOLO` is; there they would be attributes that nothing reads."""
    block = BLOCKS[name]()
    for setting, value in (("topk", 1), ("n_win", 2), ("backend", "torch"), ("auto_pad", False)):
        with pytest.raises(AttributeError, match=rf"{setting} cannot be set on a .* inside, (m\.0\..*)?attn"):
            setattr(block, setting, value)
    block.note = "attributes of other names can be set"


def test_a_class_derived_from_a_block_may_use_the_names_of_settings() -> None:
    """Such as a scale of its own for the output."""

    class Scaled(C2BRA):
        pass

    block = Scaled(32, 32)
    block.scale = nn.Parameter(torch.ones(1))
    assert "scale" in dict(block.named_parameters())


def test_set_backend_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backend.*'nonesuch'"):
        set_backend(BLOCKS["attention"](), "nonesuch")
    with pytest.raises(ValueError, match=r"backend.*'nonesuch'"):
        set_backend(torch.nn.Identity(), "nonesuch")


def test_set_backend_refuses_a_model_without_the_attention() -> None:
    """A stock model, by mistake: without an error the caller would measure the wrong thing."""
    with pytest.raises(ValueError, match=r"model must hold a bi-level.*got a Sequential"):
        set_backend(nn.Sequential(nn.Conv2d(3, 8, 1)), "torch")


def test_set_backend_reaches_the_next_prediction_of_a_yolo() -> None:
    """A `YOLO` predicts with a copy of its network, which the first prediction makes."""
    model, image = YOLO("yolo26n-bra.yaml", verbose=False), np.zeros((32, 32, 3), np.uint8)
    model.predict(image, imgsz=32, verbose=False)
    set_backend(model, "triton")  # which refuses tensors on a CPU
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve"):
        model.predict(image, imgsz=32, verbose=False)


def test_set_backend_keeps_a_layer_that_is_called_predictor() -> None:
    """The attribute of a `YOLO` that it sets to None has the same name."""
    model = nn.ModuleDict({"attn": BLOCKS["attention"](), "predictor": nn.Conv2d(8, 4, 1)})
    set_backend(model, "torch")
    assert type(model["predictor"]) is nn.Conv2d
