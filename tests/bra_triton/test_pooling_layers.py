"""The layers of `kv_downsample_mode="conv"` that a user hooked, replaced or cast are called."""

import pytest
import torch
from modules import run
from problems import relative_error, worst
from torch import nn

from bra_triton import BiLevelRoutingAttention
from bra_triton.modules.layers import is_plain_window

CONV = {
    **{"dim": 12, "num_heads": 2, "n_win": 2, "topk": 3},
    **{"kv_downsample_mode": "conv", "kv_downsample_ratio": 2},
}
# Float64 on both sides: some 1e-16 of rounding.
TOLERANCE = 1e-12


def test_a_layer_of_the_pooling_convolution_is_called():
    """The kernels would read the weight without running the layer's hooks; the reference calls the layer."""
    module = BiLevelRoutingAttention(**CONV).double()
    x, called = torch.randn(1, 4, 4, 12, dtype=torch.float64), []
    expected = module(x)
    module.kv_down.value.register_forward_hook(lambda *_: called.append(1))
    assert relative_error(module(x), expected) < TOLERANCE
    assert called == [1]


@pytest.mark.parametrize(
    "numbers",
    [
        *({name: value} for name, value in {"stride": 1, "padding": 1, "dilation": 2, "groups": 1}.items()),
        {"kernel_size": 3},  # the kernels would read past the cells
        {"bias": False},
    ],
    ids=str,
)
def test_a_pooling_convolution_with_other_numbers_is_called(numbers):
    """The kernels take stride and kernel from `kv_down`, not from the layer that replaced one of its."""
    modules = [BiLevelRoutingAttention(**CONV, backend=backend).double() for backend in ("reference", "auto")]
    for module in modules:
        for name in ("key", "value"):
            layer = nn.Conv2d(12, 12, **{"kernel_size": 2, "stride": 2, "groups": 12, **numbers})
            setattr(module.kv_down, name, layer.double())
    modules[1].load_state_dict(modules[0].state_dict())
    x, grad_out = torch.randn(2, 2, 8, 8, 12, dtype=torch.float64)
    expected, actual = (run(module, x, grad_out) for module in modules)
    errors = {name: relative_error(actual[name], value) for name, value in expected.items()}
    assert worst(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("channels", [(12, 24), (24, 12), (24, 24)])
def test_a_pooling_convolution_for_other_channels_is_called(channels):
    assert is_plain_window(nn.Conv2d(12, 12, 2, stride=2, groups=12), 12, kernel=2, stride=2)
    assert not is_plain_window(nn.Conv2d(*channels, 2, stride=2, groups=12), 12, kernel=2, stride=2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_pooling_of_another_dtype_takes_the_keys_and_values(backend, hooked):
    module, x = BiLevelRoutingAttention(**CONV, backend=backend), torch.randn(1, 4, 4, 12)
    expected = module(x)
    module.kv_down.double()
    if hooked:
        module.kv_down.register_forward_hook(lambda *_: None)
    assert module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
