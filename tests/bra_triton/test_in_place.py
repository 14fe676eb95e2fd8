"""Callers may change outputs in place, and in training also inputs, as they may with the original module."""

import pytest
import torch
from other_implementations import AuthorsNCHW
from seed_module import BiLevelRoutingAttention as Original
from torch.utils.checkpoint import checkpoint

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional
from bra_triton.backend.kernels import fused_kernels
from bra_triton.modules.inputs import for_keeping
from bra_triton.operators.library import Witness

GRAPH = torch.tensor([0, 3, 1, 2, 3, 1, 0, 2]).view(1, 2, 4, 1)
PACKED = {"num_heads": 2, "topk": 2, "n_win": 2}


def _packed(x, backend, **arguments):
    return functional.bi_level_routing_attention(x, **{**PACKED, **arguments}, backend=backend)


def _regional(x, backend, heads=2):
    maps, graph = x.permute(0, 3, 1, 2).chunk(3, 1), GRAPH[:, :heads].to(x.device)
    return functional.regional_routing_attention(*maps, 0.3, graph, (2, 3), backend=backend)[0]


def _module(kind, x, backend, **arguments):
    torch.manual_seed(0)
    return kind(12, 2, 2, topk=2, backend=backend, **arguments).to(x.device)(x)


# Functions of a map (1, 4, 6, 36), of which modules take the first 12 channels, and of a backend.
FUNCTIONS = {
    "packed": _packed,
    "packed, one region": lambda x, b: _packed(x, b, n_win=1, topk=1),
    "packed, padded": lambda x, b: _packed(x[:, :3, :5], b, padding=torch.ones(36, device=x.device)),
    "packed, soft": lambda x, b: _packed(x, b, soft_routing=True, diff_routing=True),
    "packed, LePE": lambda x, b: _packed(x, b, lepe_weight=torch.ones(12, 1, 3, 3, device=x.device)),
    "regional": _regional,
    "regional, one head": lambda x, b: _regional(x, b, heads=1),
    "module": lambda x, b: _module(BiLevelRoutingAttention, x[..., :12], b),
    "module, bare": lambda x, b: _module(
        BiLevelRoutingAttention, x[..., :12], b, param_attention="qkv", side_dwconv=0
    ),
    "NCHW": lambda x, b: _module(
        NCHWBiLevelRoutingAttention, x[..., :12].permute(0, 3, 1, 2), b, side_dwconv=0
    ),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_backend = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])


def _changed(y, p):
    y += p
    y[:, ::2] *= 2
    return y.relu_()


def _added(y, p):
    is_even = torch.arange(y.shape[1], device=y.device).view(-1, 1, 1) % 2 == 0
    return torch.where(is_even, 2 * (y + p), y + p).relu()


def _gradients(name, backend, finish, device, learns=True):
    """Output, and gradients of the map and of `p`, a number that `finish` adds to the output."""
    x = torch.randn(1, 4, 6, 36, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_(learns)
    p = torch.ones((), device=device, requires_grad=True)
    y = finish(FUNCTIONS[name](x, backend), p)
    return [y, *torch.autograd.grad(y.square().sum(), [x, p] if learns else [p])]


@every_backend
@every_function
@pytest.mark.parametrize("learns", [True, False])
def test_a_changed_output_has_the_gradients_of_a_copy(name, backend, learns, device):
    """Also if the map needs no gradient."""
    actual = _gradients(name, backend, _changed, device, learns)
    expected = _gradients(name, backend, _added, device, learns)
    assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("finish", [_changed, _added])
@pytest.mark.parametrize(("name", "function"), [("packed", "attend"), ("regional", "attend_routed")])
def test_only_a_changed_output_is_computed_anew(name, function, finish, device, monkeypatch):
    kernels, calls = fused_kernels("torch"), []
    computed = getattr(kernels, function)
    monkeypatch.setattr(kernels, function, lambda *a, **k: calls.append(a) or computed(*a, **k))
    _gradients(name, "torch", finish, device)
    assert len(calls) == (2 if finish is _changed else 1)


@pytest.mark.parametrize("name", ["packed", "regional"])
def test_whatever_becomes_of_saved_tensors(name, device):
    expected = _gradients(name, "torch", _added, device)

    for way in ("inside", "after", "on the CPU"):
        x = torch.randn(1, 4, 6, 36, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        p = torch.ones((), device=device, requires_grad=True)

        def attend(x, p, way=way):
            y = FUNCTIONS[name](x, "torch")
            return _changed(y, p) if way == "inside" else y

        if way == "on the CPU":
            with torch.autograd.graph.save_on_cpu():
                y = attend(x, p)
        else:
            y = checkpoint(attend, x, p, use_reentrant=False)
        y = y if way == "inside" else _changed(y, p)
        actual = [y, *torch.autograd.grad(y.square().sum(), [x, p])]
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(actual, expected, strict=True)), way


@pytest.mark.parametrize("name", ["packed", "regional"])
def test_in_a_compiled_graph(name, device):
    torch._dynamo.reset()
    expected = _gradients(name, "torch", _added, device)
    x = torch.randn(1, 4, 6, 36, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    p = torch.ones((), device=device, requires_grad=True)
    run = torch.compile(
        lambda x, p: _changed(FUNCTIONS[name](x, "torch"), p), backend="aot_eager", fullgraph=True
    )
    y = run(x, p)
    actual = [y, *torch.autograd.grad(y.square().sum(), [x, p])]
    assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(actual, expected, strict=True))


# Memory layouts of an NHWC map. Each function takes an NHWC view of a map that is NCHW in memory.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "NCHW": lambda x: x,
    "some channels": lambda x: torch.cat([x, x], -1).contiguous()[..., :12],
    "one image of NCHW": lambda x: x[:1],
    "some rows": lambda x: torch.cat([x, x], 1).contiguous()[:, :4],
}


def _gradients_of_an_added_input(module, learns, changes=True, layout="contiguous", dtype=torch.float32):
    """Gradients of the leaf from which `x` is computed, and of the parameters, for `x += module(x)` (with
    `changes`) or `x = x + module(x)`; `dtype` is that of the leaf and of `x`."""
    leaf = torch.randn(2, 12, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(learns)
    leaf = leaf.to(next(module.parameters()).device, dtype)
    takes_nchw = isinstance(module, AuthorsNCHW | NCHWBiLevelRoutingAttention)
    x = 2 * (leaf if takes_nchw else leaf.permute(0, 2, 3, 1))
    x = x.to(memory_format=torch.channels_last) if takes_nchw else LAYOUTS[layout](x)
    if changes:
        x += module(x)
    else:
        x = x + module(x)
    return torch.autograd.grad(x.square().sum(), [*([leaf] if learns else []), *module.parameters()])


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("side", [3, 0])
@pytest.mark.parametrize("form", ["qkv", "qkvo"])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_an_input_may_be_changed_in_training(backend, form, side, learns, device):
    """`x += attention(x)`: the original copies the map before it projects it, and so does ours."""
    arguments = {"param_attention": form, "side_dwconv": side, "n_win": 2, "topk": 2}
    original = Original(12, 2, **arguments).to(device)
    expected = _gradients_of_an_added_input(original, learns, changes=False)
    module = BiLevelRoutingAttention(12, 2, **arguments, backend=backend).to(device)
    module.load_state_dict(original.state_dict())

    def agrees(actual):
        return all(torch.allclose(a, e, atol=1e-4) for a, e in zip(actual, expected, strict=True))

    assert agrees(_gradients_of_an_added_input(original, learns))
    assert agrees(_gradients_of_an_added_input(module, learns))


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_may_be_changed_however_it_lies_in_memory(layout, learns, device):
    original = Original(12, 2, n_win=2, topk=2).to(device)
    module = BiLevelRoutingAttention(12, 2, n_win=2, topk=2, backend="torch").to(device)
    module.load_state_dict(original.state_dict())
    expected = _gradients_of_an_added_input(original, learns, layout=layout)
    actual = _gradients_of_an_added_input(module, learns, layout=layout)
    assert all(torch.allclose(a, e, atol=1e-4) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("of_map", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_may_be_changed_under_autocast(dtype, of_map, device):
    """The projection keeps a bfloat16 copy of a float32 map. A bfloat16 map it keeps itself, so the module
    must copy the map before."""
    module = BiLevelRoutingAttention(12, 2, n_win=2, topk=2, backend="torch").to(device, dtype)
    with torch.autocast(device.type, torch.bfloat16):
        expected = _gradients_of_an_added_input(module, True, changes=False, dtype=of_map)
        actual = _gradients_of_an_added_input(module, True, dtype=of_map)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_map_is_copied_only_if_the_projection_would_keep_it(device):
    """An unnecessary copy would cost time and memory."""
    layer, x = torch.nn.Linear(12, 36, device=device), torch.randn(1, 4, 6, 12, device=device)
    assert for_keeping(x, layer) is not x
    y = 2 * x.requires_grad_()
    assert for_keeping(y, layer) is not y
    assert for_keeping(x, layer) is x  # a leaf: autograd forbids changing it in place
    across = (2 * x).transpose(1, 2)
    assert for_keeping(across, layer) is across
    with torch.no_grad():
        assert for_keeping(y, layer) is y
    with torch.autocast(device.type, torch.bfloat16):
        assert for_keeping(y, layer) is y
        half = y.bfloat16()
        assert for_keeping(half, layer) is not half
    assert for_keeping(y, layer.requires_grad_(False)) is y


def test_a_map_without_data_is_taken_with_gradients():
    """Autocast does not know the device "meta"."""
    module = BiLevelRoutingAttention(12, 2, n_win=2, topk=2).to("meta")
    assert module(2 * torch.empty(1, 4, 6, 12, device="meta")).shape == (1, 4, 6, 12)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", [AuthorsNCHW, NCHWBiLevelRoutingAttention])
def test_an_nchw_input_may_not_be_changed_with_the_original_either(kind, learns, device):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _gradients_of_an_added_input(kind(12, 2, n_win=2, topk=2).to(device), learns)


def test_a_witness_holds_no_memory(device):
    out = torch.randn(64, 64, device=device)
    witness = Witness(out)
    assert not witness.sees_change
    assert all(x.untyped_storage().nbytes() == 0 for x in vars(witness).values() if torch.is_tensor(x))
    out.view(-1)[3:5].mul_(2)
    assert witness.sees_change
