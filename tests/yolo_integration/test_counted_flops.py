"""What Ultralytics counts as the operations of a block: the products of routing, attention and layers."""

import math

import pytest
import torch
from torch import nn
from ultralytics.utils import torch_utils

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.modules.permuted import PermutedBiLevelRoutingAttention
from bra_triton.modules.tokens import TokenBiLevelRoutingAttention
from bra_triton.yolo_integration import BiLevelRoutingAttention2d, NCHWBiLevelRoutingAttention2d, flops


def test_flops_are_those_of_the_products() -> None:
    attention = BiLevelRoutingAttention(8, num_heads=2, n_win=2, topk=3, qk_dim=4, auto_pad=True)
    attention.total_ops = 0
    x = torch.randn(5, 4, 5, 8)  # padded to 4 x 6: 4 regions of 6 tokens
    flops.count_attention(attention, (x,), x)
    routing, logits, values = 4 * 4 * 4, 24 * 3 * 6 * 4, 24 * 3 * 6 * 8
    assert attention.total_ops == 5 * (routing + logits + values)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(PermutedBiLevelRoutingAttention, (1, 8, 6, 4)), (TokenBiLevelRoutingAttention, (1, 36, 8))],
)
def test_flops_of_other_layouts(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    attention = kind(8, 2, 2, topk=3)
    attention.total_ops = 0
    flops.count_attention(attention, (torch.empty(shape),), torch.empty(shape))
    tokens = math.prod(shape) // 8
    assert attention.total_ops == 4 * 4 * 8 + tokens * 3 * (tokens // 4) * 16


def test_flops_of_fewer_keys() -> None:
    attention = BiLevelRoutingAttention(8, 2, 2, topk=3, kv_downsample_mode="ada_avgpool", kv_per_win=1)
    attention.total_ops = 0
    x = torch.randn(1, 4, 6, 8)
    flops.count_attention(attention, (x,), x)
    assert attention.total_ops == 4 * 4 * 8 + 24 * 3 * 1 * 16


def test_flops_of_the_nchw_form_are_those_of_the_products() -> None:
    attention = NCHWBiLevelRoutingAttention(8, num_heads=2, n_win=2, topk=3)
    attention.total_ops = 0
    x = torch.randn(5, 8, 4, 5)  # regions of 2 x 2, padded to 4 x 6: 6 regions of 4 tokens
    flops.count_attention(attention, (x,), x)
    routing, logits, values = 6 * 6 * 8, 24 * 3 * 4 * 8, 24 * 3 * 4 * 8
    assert attention.total_ops == 5 * (routing + logits + values)


def test_the_summary_counts_every_size() -> None:
    """At 192 pixels and below P5 has fewer than 7 tokens a side; the summary once said 0.0 for such sizes."""
    pytest.importorskip("thop")
    model = nn.Sequential(nn.Conv2d(3, 32, 32, stride=32), BiLevelRoutingAttention2d(32))
    model[1].attn = BiLevelRoutingAttention(32, auto_pad=True)
    counts = {}
    for size in (32, 64, (224, 448)):
        height, width = size if isinstance(size, tuple) else (size, size)
        tokens, padded = height * width // 32**2, 7 * 7 * -(-height // 224) * -(-width // 224)
        convolution, lepe = 3 * 32 * 32**2 * tokens, 9 * 32 * padded
        projections = 4 * 32**2 * tokens  # padding holds the bias
        attention = 49**2 * 32 + padded * 4 * (padded // 49) * 64
        counts[size] = convolution + projections + lepe + attention
        assert torch_utils.get_flops(model, size) == pytest.approx(2e-9 * counts[size], rel=1e-9)
    assert torch_utils.get_flops(nn.Sequential(model[0]), 64) == pytest.approx(2e-9 * 3 * 32 * 32**2 * 4)


def test_a_projection_that_is_called_on_the_padding_is_counted_there() -> None:
    """The profiler's hooks make a plain projection run on the padding, too: that is not counted."""
    thop = pytest.importorskip("thop")
    plain, replaced = (BiLevelRoutingAttention(8, 2, 2, topk=3, auto_pad=True) for _ in range(2))
    replaced.qkv = nn.Linear(8, 24)
    x = torch.randn(1, 3, 5, 8)  # 15 tokens, 4 x 6 with padding
    counts = [thop.profile(module, inputs=(x,), verbose=False)[0] for module in (plain, replaced)]
    assert counts[1] - counts[0] == 9 * 8 * 24


def test_a_model_of_any_dtype_and_number_of_channels_is_counted() -> None:
    pytest.importorskip("thop")
    model = nn.Sequential(nn.Conv2d(1, 32, 1), BiLevelRoutingAttention2d(32))
    expected = torch_utils.get_flops(model, 10)
    assert expected > 0
    assert torch_utils.get_flops(model.double(), 10) == expected


def test_a_compiled_model_counts_as_much_as_the_model() -> None:
    """Loggers ask for the count of the model in training, which `compile=True` has wrapped."""
    pytest.importorskip("thop")
    model = nn.Sequential(nn.Conv2d(3, 32, 1), BiLevelRoutingAttention2d(32))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.zeros(1, 3, 10, 10))
    assert torch_utils.get_flops(compiled, 10) == torch_utils.get_flops(model, 10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", [BiLevelRoutingAttention2d, NCHWBiLevelRoutingAttention2d])
def test_profiler_counts_the_projections_and_lepe_once(kind: type[nn.Module], backend: str) -> None:
    thop = pytest.importorskip("thop")
    model = nn.Sequential(kind(32, {"topk": 2, "n_win": 4}))
    model[0].attn.backend = backend
    total, _ = thop.profile(model, inputs=(torch.randn(1, 32, 8, 8),), verbose=False)
    projections, lepe = 64 * 32 * (96 + 32), 64 * 9 * 32
    routing, attention = 16 * 16 * 32, 64 * (2 * 4) * 64
    assert total == projections + lepe + routing + attention
