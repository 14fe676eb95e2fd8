"""The projections' convolutions on CPUs where MKL is slow: when they are used, and what they compute."""

import copy
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from problems import relative_error
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bra_triton import BiLevelRoutingAttention, nchwBRA
from bra_triton.modules import nchw, nhwc
from bra_triton.operators import linear
from bra_triton.operators.linear import convolved, is_convolved

# float32 beside float64: up to 800 products of normal numbers are added up.
TOLERANCE = 2e-6
AMD = {"cpu_name": "AMD EPYC", "avx512_f": True}


@pytest.fixture(autouse=True)
def _slow_mkl(monkeypatch):
    """Two threads on a processor whose MKL is slow, whatever the machine."""
    monkeypatch.setattr(linear, "_is_mkl_slow", lambda: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def _layer(rows=20, columns=20, channels=128, out=512, bias=True):
    x = torch.randn(2, rows, columns, channels, requires_grad=True)
    layer = nn.Linear(channels, out, bias)
    return x, layer.weight, layer.bias


def _truth(x, weight, bias):
    given = [None if each is None else each.detach().double().requires_grad_() for each in (x, weight, bias)]
    return F.linear(*given), [each for each in given if each is not None]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("threads", [1, 2])
def test_results_and_gradients_are_the_linear_layers(threads, bias):
    torch.set_num_threads(threads)
    given = _layer(bias=bias)
    out, (expected, inputs) = convolved(*given), _truth(*given)
    grad = torch.randn_like(out)
    assert relative_error(out, expected) < TOLERANCE
    given = [each for each in given if each is not None]
    pairs = zip(
        torch.autograd.grad(out, given, grad),
        torch.autograd.grad(expected, inputs, grad.double()),
        strict=True,
    )
    for actual, truth in pairs:
        assert actual.shape == truth.shape
        assert relative_error(actual, truth) < TOLERANCE


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_only_the_wanted_gradients(wanted):
    given = [each.detach().requires_grad_(i in wanted) for i, each in enumerate(_layer())]
    out, (expected, inputs) = convolved(*given), _truth(*given)
    # The map is read only for the weight's gradient, and the weight only for the map's.
    with torch.no_grad():
        for needs, each in ((1, given[0]), (0, given[1]), (3, given[2])):
            if needs not in wanted:
                each.add_(1)
    grad = torch.randn_like(out)
    out.backward(grad)
    truth = torch.autograd.grad(expected, inputs, grad.double())
    for i, (each, true) in enumerate(zip(given, truth, strict=True)):
        assert (each.grad is not None) == (i in wanted)
        assert each.grad is None or relative_error(each.grad, true) < TOLERANCE


def test_a_map_that_a_frozen_layer_projects_is_not_kept():
    x, weight, bias = _layer()
    copy = x * 1
    out = convolved(copy, weight.detach(), bias)
    alive = weakref.ref(copy)
    del copy
    assert out.requires_grad
    assert alive() is None


@pytest.mark.parametrize("batched", [False, True])
def test_second_derivatives_and_batches_of_gradients(batched):
    """As a linear layer has them: the attention refuses both, but a user may want those of `wo` alone."""
    given = _layer(channels=64, out=64)
    expected, inputs = _truth(*given)
    grads = torch.randn(*([3] if batched else []), *expected.shape)
    options = {"create_graph": True, "is_grads_batched": batched}
    first = torch.autograd.grad(convolved(*given), given, grads, **options)
    truth = torch.autograd.grad(expected, inputs, grads.double(), **options)
    second = torch.autograd.grad(first[1].square().sum(), given[0])
    true_second = torch.autograd.grad(truth[1].square().sum(), inputs[0])
    for actual, each in zip((*first, *second), (*truth, *true_second), strict=True):
        assert relative_error(actual, each) < TOLERANCE
    without_graph = torch.autograd.grad(convolved(*given), given, grads, is_grads_batched=batched)
    for actual, each in zip(without_graph, truth, strict=True):
        assert relative_error(actual, each) < TOLERANCE


def test_the_same_bits_every_time_and_the_output_may_be_changed_in_place():
    def results():
        out = convolved(*given)
        grads = torch.autograd.grad(out, given, torch.ones_like(out))
        return out.add_(1), *grads

    given = _layer()
    assert all(map(torch.equal, results(), results()))


def test_it_is_used_for_a_large_float32_map():
    assert is_convolved(*_layer())
    assert is_convolved(*_layer(bias=False))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([x.double() for x in _layer()], id="float64"),
        pytest.param([x.bfloat16() for x in _layer()], id="bfloat16"),
        pytest.param([x.detach().to("meta") for x in _layer()], id="another device"),
        pytest.param([_layer()[0].transpose(1, 2), *_layer()[1:]], id="strides that are not those of NHWC"),
        pytest.param(_layer(9, 8, 128, 1024), id="a map for which PyTorch does not call oneDNN"),
        pytest.param(_layer(20, 20, 64, 64), id="few products"),
        pytest.param(_layer(0), id="no tokens"),
        pytest.param((*_layer()[:2], _layer()[2][:1]), id="one bias for all channels"),
        pytest.param((*_layer()[:2], _layer()[2].double()), id="bias of another dtype"),
        pytest.param((*_layer()[:2], _layer()[2].to("meta")), id="bias on another device"),
        pytest.param(
            (_layer()[0], *(each.to("meta") for each in _layer()[1:])), id="weight on another device"
        ),
        pytest.param((_layer()[0], _layer()[1].to_sparse(), None), id="sparse weight"),
        pytest.param((_layer()[0], _layer(channels=64)[1], None), id="weight for other channels"),
        pytest.param((_layer()[0], _layer()[1][0], None), id="weight of a row"),
    ],
)
def test_other_maps_keep_the_linear_layer(given):
    assert not is_convolved(*given)


def test_other_circumstances_keep_the_linear_layer(monkeypatch):
    given = _layer()
    with FlopCounterMode(display=False):
        assert not is_convolved(*given)
    with BaseTorchFunctionMode():
        assert not is_convolved(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_convolved(*given)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_convolved(*given)
    assert not torch.vmap(lambda x: torch.tensor(is_convolved(x, *given[1:])))(given[0][None]).any()
    found = []
    torch.jit.trace(lambda x: found.append(is_convolved(x, *given[1:])) or x, given[0], check_trace=False)
    assert found == [False]
    torch.set_num_threads(1)
    assert not is_convolved(*given)
    torch.set_num_threads(2)
    monkeypatch.setattr(linear, "_is_mkl_slow", lambda: False)
    assert not is_convolved(*given)


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_a_setting_for_shorter_products_keeps_the_linear_layer(kind):
    """The linear layer follows PyTorch's setting for matrix products, not that for convolutions."""
    if not hasattr(torch.backends.mkldnn, kind):
        pytest.skip("PyTorch 2.8 has no such setting")
    setting = getattr(torch.backends.mkldnn, kind)
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        assert not is_convolved(*_layer())
    finally:
        setting.fp32_precision = before
    assert is_convolved(*_layer())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (AMD, True),
        (AMD | {"avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8481C", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_mkl_is_slow_where_it_does_not_use_avx_512(capabilities, expected, monkeypatch):
    monkeypatch.undo()  # brings back the function
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    is_slow = linear._is_mkl_slow.__wrapped__
    assert is_slow() == expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not is_slow()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not is_slow()


def _nhwc(**arguments):
    return BiLevelRoutingAttention(128, 4, n_win=5, backend="torch", **arguments)


def _calls(module, x):
    """How many layers of a call are computed as convolutions."""
    found = mock.Mock(side_effect=convolved)
    with mock.patch.object(nhwc, "convolved", found), mock.patch.object(nchw, "convolved", found):
        module(x)
    return found.call_count


def test_both_modules_use_it_for_their_projections():
    x = torch.randn(2, 20, 20, 128)
    assert _calls(_nhwc(), x) == 2
    assert _calls(_nhwc(param_attention="qkv"), x) == 1
    assert _calls(nchwBRA(128, 4, n_win=5, backend="torch"), x.permute(0, 3, 1, 2)) == 2


def test_the_module_computes_the_same_with_and_without():
    module, x = _nhwc(), torch.randn(2, 20, 20, 128)
    out = module(x)
    with mock.patch.object(linear, "_is_mkl_slow", return_value=False):
        expected = module(x)
    assert relative_error(out, expected.double()) < TOLERANCE


@pytest.mark.parametrize("kind", ["NHWC", "NCHW"])
def test_a_frozen_projection_lets_its_map_be_changed_in_place(kind):
    x = torch.randn(2, 20, 20, 128, requires_grad=True)
    module = _nhwc() if kind == "NHWC" else nchwBRA(128, 4, n_win=5, backend="torch")
    axes = (0, 1, 2, 3) if kind == "NHWC" else (0, 3, 1, 2)
    module.requires_grad_(False)
    changed = x.permute(axes) * 1
    assert _calls(module, changed) == 2
    changed += module(changed)
    changed.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("lepe", [0, 3])
@pytest.mark.parametrize("side", [5, 20], ids=["small", "large"])
def test_parameters_may_be_plain_attributes(side, lepe):
    """As in the replicas of `nn.DataParallel`, and in layers that FSDP has flattened."""
    module, x = _nhwc(side_dwconv=lepe), torch.randn(2, side, side, 128)
    replica = copy.deepcopy(module)
    for layer in replica.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            setattr(layer, name, parameter * 1)
    assert not list(replica.parameters())
    assert torch.equal(replica(x), module(x))


def test_layers_that_must_be_called_are_called():
    x = torch.randn(2, 20, 20, 128)
    assert _calls(BiLevelRoutingAttention(128, 4, n_win=5, backend="reference"), x) == 0
    hooked = _nhwc()
    seen = []
    hooked.wo.register_forward_hook(lambda *_: seen.append("wo"))
    hooked.qkv.qkv.register_forward_hook(lambda *_: seen.append("qkv"))
    assert _calls(hooked, x) == 0
    assert seen == ["qkv", "wo"]
    outer = _nhwc()
    outer.qkv.register_forward_pre_hook(lambda *_: seen.append("outer"))
    assert _calls(outer, x) == 1
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        assert _calls(_nhwc(), x) == 0
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 2
