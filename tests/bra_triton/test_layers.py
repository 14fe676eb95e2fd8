"""Layers of the modules that a user replaced, wrapped or hooked are called as the original calls them."""

import copy
import warnings

import pytest
import seed_module
import torch
from modules import run
from other_implementations import AuthorsNCHW
from problems import relative_error, worst
from torch import nn
from torch.nn.utils import parametrize, prune

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.backend import select
from bra_triton.functional import bi_level_routing_attention
from bra_triton.modules import downsampling
from bra_triton.modules.layers import is_plain_convolution

SIZE = {"dim": 12, "num_heads": 2, "n_win": 2, "topk": 3}
SOFT = {"soft_routing": True, "diff_routing": True, "param_routing": True}
AVERAGED = {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}
# Float64 on both sides: some 1e-16 of rounding.
TOLERANCE = 1e-12


class Adapter(nn.Module):
    """Wraps a layer as PEFT does: exposes the layer's weight, and adds to the layer's output."""

    def __init__(self, base, extra):
        super().__init__()
        self.base_layer, self.extra = base, extra
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base_layer(x) + self.extra(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _double(layer):
    return layer.register_forward_hook(lambda layer, inputs, out: 2 * out)


def _weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still in many models
        nn.utils.weight_norm(layer).weight_g.data *= 2


def _patch_forward(layer):
    """Replaces `forward` of one object, as accelerate does."""
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)


@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_a_convolution_is_plain_if_it_keeps_the_size(side):
    """A convolution that is not plain is called as a layer, which takes longer than LePE in the kernels."""
    plain = {"kernel_size": side, "padding": side // 2, "groups": 8}
    assert is_plain_convolution(nn.Conv2d(8, 8, **plain), 8)
    for change in (
        {"groups": 1},
        {"padding": side // 2 + 1},
        {"kernel_size": side + 1, "padding": (side + 1) // 2},
        {"kernel_size": (side, side + 2)},
        {"stride": 2},
        {"dilation": 2},
        {"padding_mode": "circular"},
    ):
        assert not is_plain_convolution(nn.Conv2d(8, 8, **{**plain, **change}), 8), change


def _route_backwards(module):
    def turned(router, inputs, out):
        return out[0], 3 - out[1]

    module.router.register_forward_hook(turned)


# Changes of the layers, and constructor arguments without which a change would make no difference.
CHANGES = {
    "lepe: hook": (lambda m: _double(m.lepe), {}),
    "lepe: pre-hook": (lambda m: m.lepe.register_forward_pre_hook(lambda layer, x: (2 * x[0],)), {}),
    "lepe: adapter": (lambda m: setattr(m, "lepe", Adapter(m.lepe, nn.Conv2d(12, 12, 1))), {}),
    "lepe: two layers": (lambda m: setattr(m, "lepe", nn.Sequential(m.lepe, nn.Tanh())), {}),
    "lepe: dense": (lambda m: setattr(m, "lepe", nn.Conv2d(12, 12, 3, padding=1)), {}),
    "lepe: dilated in place": (lambda m: vars(m.lepe).update(dilation=(2, 2), padding=(2, 2)), {}),
    "lepe: parametrized": (
        lambda m: parametrize.register_parametrization(m.lepe, "weight", Doubled()),
        {},
    ),
    "lepe: pruned": (lambda m: prune.l1_unstructured(m.lepe, "weight", 0.5), {}),
    "lepe: weight_norm": (lambda m: _weight_norm(m.lepe), {}),
    "lepe: patched forward": (lambda m: _patch_forward(m.lepe), {}),
    "lepe: where there was none": (
        lambda m: (
            vars(m).pop("lepe"),
            setattr(m, "lepe", nn.Conv2d(12, 12, 3, padding=1, groups=12)),
        ),
        {"side_dwconv": 0},
    ),
    "emb: hook": (lambda m: _double(m.router.emb), SOFT),
    "emb: hook on the identity": (lambda m: _double(m.router.emb), {"soft_routing": True}),
    "emb: adapter": (
        lambda m: setattr(m.router, "emb", Adapter(m.router.emb, nn.Linear(12, 12))),
        SOFT,
    ),
    "emb: pruned": (lambda m: prune.l1_unstructured(m.router.emb, "weight", 0.5), SOFT),
    "router: hook": (_route_backwards, {}),
    "router: hook, soft": (_route_backwards, SOFT),
    "router: replaced": (lambda m: setattr(m, "router", seed_module.TopkRouting(12, 2)), {}),
    "kv_down: hook": (lambda m: _double(m.kv_down), AVERAGED),
    "kv_down: replaced": (lambda m: setattr(m, "kv_down", nn.LPPool2d(2, 2)), AVERAGED),
    "qkv: hook inside": (lambda m: _double(m.qkv.qkv), {}),
    "wo: pruned": (lambda m: prune.l1_unstructured(m.wo, "weight", 0.5), {}),
}


def _change(name, *modules):
    for module in modules:
        torch.manual_seed(1)
        CHANGES[name][0](module)
        module.double()


def _assert_same(actual, expected):
    names = [name for name, value in expected.items() if value is not None]
    errors = {name: relative_error(actual[name], expected[name]) for name in names}
    assert worst(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("name", CHANGES)
def test_is_called_as_by_the_original(name):
    """Compares output and all gradients on a map that needs padding; the layers get the padding, too."""
    arguments = {**SIZE, "auto_pad": True, **CHANGES[name][1]}
    original, ours = seed_module.BiLevelRoutingAttention(**arguments), BiLevelRoutingAttention(**arguments)
    ours.load_state_dict(original.state_dict())
    before = copy.deepcopy(ours).double()
    _change(name, original, ours)
    x, grad_out = torch.randn(2, 2, 7, 8, 12, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TRITON_INTERPRET", raising=False)
        expected, actual = run(original, x, grad_out), run(ours, x, grad_out)
        _assert_same(actual, expected)
        assert relative_error(before(x), expected["out"]) > 1e-3, "the change has no effect on the output"


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_lepe_of_another_dtype_is_cast_to_that_of_the_values(kind):
    module, x = kind(12, 2, 2, topk=2), torch.randn(1, 12, 12, 12)
    expected = module(x)
    module.lepe.double()
    for module.backend in ("torch", "reference"):
        assert module(x).dtype == torch.float32
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    module.backend = "auto"
    exported = torch.jit.trace(module, x, check_trace=False)
    torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CHANGES if name.startswith("lepe") and "none" not in name])
def test_lepe_is_called_as_by_the_authors_nchw_form(name):
    lepe = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    original, ours = AuthorsNCHW(12, 2, 2, 3, lepe), NCHWBiLevelRoutingAttention(12, 2, 2, topk=3)
    ours.load_state_dict(original.state_dict())
    _change(name, original, ours)
    x, grad_out = torch.randn(2, 2, 12, 5, 6, dtype=torch.float64)
    ours.backend = "torch"
    _assert_same(run(ours, x, grad_out), run(original, x, grad_out))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_projection_that_changes_in_every_call_is_called_once(norm):
    """In training each call of spectral norm changes the weight. The padding needs no call of its own."""
    arguments = {**SIZE, "auto_pad": True}
    modules = seed_module.BiLevelRoutingAttention(**arguments), BiLevelRoutingAttention(**arguments)
    for module in modules:
        norm(module.qkv.qkv)
        module.double()
    modules[1].load_state_dict(modules[0].state_dict())
    x, called = torch.randn(2, 7, 9, 12, dtype=torch.float64), []
    modules[1].qkv.register_forward_hook(lambda *_: called.append(1))
    for _ in range(3):
        _assert_same(*(run(module, x, torch.ones_like(x)) for module in reversed(modules)))
    assert len(called) == 3


class Spread(nn.Module):
    """A projection of a map that is not a function of single tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(12, 36, 3, padding=1)

    def forward(self, x):
        return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_a_projection_of_neighbouring_tokens_sees_the_padding():
    """Near the map's edge, padding tokens then hold other values than elsewhere."""
    module = BiLevelRoutingAttention(**SIZE, auto_pad=True).double()
    module.qkv = Spread().double()
    x = torch.randn(1, 5, 7, 12, dtype=torch.float64)
    whole = module(nn.functional.pad(x, (0, 0, 0, 1, 0, 1)))
    assert relative_error(module(x), whole[:, :5, :7]) < TOLERANCE
    maps = module(x, ret_attn_mask=True)
    assert relative_error(maps[0], whole[:, :5, :7]) < TOLERANCE
    assert [m.shape[:3] for m in maps[1:3]] == [(1, 4, 3), (1, 4, 3)]


@pytest.mark.parametrize("layer", ["qkv_linear", "output_linear"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_nchw_forms_projections_fire(layer, kind):
    module, fired = NCHWBiLevelRoutingAttention(12, 2, 2, topk=3, backend="torch"), []
    getattr(getattr(module, layer), f"register_{kind}_hook")(lambda *_: fired.append(kind))
    module(torch.randn(1, 12, 4, 4)).sum().backward()
    assert fired == [kind]


def _records(module, x):
    """The tensors that hooks on `lepe` and `router` receive, sorted by the layer's name."""
    seen = []
    for name in ("lepe", "router"):
        layer = getattr(module, name)
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen.append((name, *inputs)))
        layer.register_forward_hook(
            lambda layer, inputs, out, name=name: seen.append(
                (name, *(out if isinstance(out, tuple) else [out]))
            )
        )
        layer.register_full_backward_hook(
            lambda layer, grad_in, grad_out, name=name: seen.append((name, *grad_in, *grad_out))
        )
    module(x).square().sum().backward()
    return sorted(seen, key=lambda record: record[0])


def test_hooks_see_what_they_see_in_the_original(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {**SIZE, "auto_pad": True, **SOFT}
    original, ours = (
        kind(**arguments).double() for kind in (seed_module.BiLevelRoutingAttention, BiLevelRoutingAttention)
    )
    ours.load_state_dict(original.state_dict())
    x = torch.randn(2, 7, 8, 12, dtype=torch.float64, requires_grad=True)
    expected, actual = _records(original, x), _records(ours, x)
    assert [record[0] for record in expected] == 3 * ["lepe"] + 3 * ["router"]
    for theirs, mine in zip(expected, actual, strict=True):
        assert theirs[0] == mine[0]
        for a, b in zip(theirs[1:], mine[1:], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                assert relative_error(b.double(), a.double()) < TOLERANCE


@pytest.mark.parametrize(
    "change", [lambda m: prune.random_unstructured(m.lepe, "weight", 0.5), lambda m: _weight_norm(m.lepe)]
)
@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_a_weight_that_is_made_anew_trains_for_two_steps(kind, change):
    """The weight must be computed in every step: the first step's weight has no graph in the second."""
    module = kind(12, 2, 2, topk=3, backend="torch")
    change(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    x = torch.randn(1, 12, 12, 12)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    made_of = next(p for name, p in module.named_parameters() if name.startswith("lepe.weight_"))
    assert made_of.grad.any()


def test_dynamic_quantisation_of_every_linear_layer(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 4, 4, 12)
    arguments = {**SIZE, **SOFT}
    original, ours = seed_module.BiLevelRoutingAttention(**arguments), BiLevelRoutingAttention(**arguments)
    ours.load_state_dict(original.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        outs = [
            torch.ao.quantization.quantize_dynamic(module.eval(), {nn.Linear})(x)
            for module in (original, ours)
        ]
    assert relative_error(outs[1], outs[0].double()) < 1e-5  # all but the quantised layers is float32
    assert relative_error(ours(x), outs[0].double()) > 1e-4


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_reference_serves_and_says_so(backend, caplog, monkeypatch):
    """Also if another backend is named, because profilers put hooks on every layer."""
    monkeypatch.setattr(select, "_logged", set())
    module = BiLevelRoutingAttention(**SIZE, **AVERAGED, backend=backend)
    x, called = torch.randn(1, 4, 4, 12), []
    expected = module(x)
    handles = [
        layer.register_forward_hook(lambda layer, inputs, out: called.append(layer))
        for layer in module.modules()
        if layer is not module
    ]
    with caplog.at_level("WARNING", logger="bra_triton"):
        assert relative_error(module(x), expected.double()) < 1e-5
    (record,) = caplog.records
    assert record.message.endswith(", here router and kv_down")
    assert {*called} == {*module.modules()} - {module}
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x), expected)


def test_nothing_is_called_without_need(monkeypatch):
    """Kernels compute LePE and routing without calling these layers, also if another layer is hooked."""
    module = BiLevelRoutingAttention(**SIZE, backend="torch")
    module.wo.register_forward_hook(lambda *_: None)
    for layer in (module.lepe, module.router, module.router.emb, module.kv_down):
        monkeypatch.setattr(type(layer), "forward", lambda *_: pytest.fail("called"))
    module(torch.randn(1, 4, 4, 12))


def test_a_hooked_router_chooses_as_an_unhooked_one_in_half_precision():
    """Both route by float32 means of regions; means in half precision would choose other regions."""
    module = BiLevelRoutingAttention(16, 1, 7, topk=3, **SOFT).bfloat16()
    x = torch.randn(1, 14, 14, 16).bfloat16()
    expected, seen = module(x, ret_attn_mask=True)[2], []
    module.router.register_forward_hook(lambda router, inputs, out: seen.append(out[1]))
    module(x)
    assert torch.equal(seen[0], expected)


def test_a_hooked_router_passes_no_gradient_without_diff_routing():
    module = BiLevelRoutingAttention(**SIZE, soft_routing=True, backend="torch").double()
    x, grad_out = torch.randn(2, 1, 4, 4, 12, dtype=torch.float64)
    expected = run(module, x, grad_out)
    module.router.register_forward_hook(lambda *_: None)
    actual = run(module, x, grad_out)
    assert worst(relative_error(actual[name], value) for name, value in expected.items()) < TOLERANCE


class OwnRouter(nn.Module):
    """Chooses one region by a layer of its own."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(12, 12)

    def forward(self, query, key):
        r_weight, r_idx = (self.emb(query) @ key.mT).softmax(-1).topk(1)
        return r_weight, r_idx.int()


def test_a_router_of_the_users_own_gets_regions_in_the_dtype_of_its_parameters():
    """Means of regions are float32. The numbers of regions that it returns may be of any type of integers."""
    module = BiLevelRoutingAttention(**SIZE)
    module.router = OwnRouter()
    out, _, r_idx, _ = module.bfloat16()(torch.randn(1, 4, 4, 12).bfloat16(), ret_attn_mask=True)
    assert (out.dtype, r_idx.dtype) == (torch.bfloat16, torch.int64)


def test_a_projection_of_another_width_is_refused():
    module = BiLevelRoutingAttention(**SIZE, backend="torch")
    module.qkv = nn.Linear(12, 48)
    with pytest.raises(ValueError, match=r"qkv must have 2\*qk_dim \+ dim = 36 channels, got 48"):
        module(torch.randn(1, 4, 4, 12))


def test_a_layer_of_the_router_that_would_get_no_gradient_is_refused():
    """As a plain one is. A layer without parameters, or with frozen ones, has none to get."""
    module = BiLevelRoutingAttention(**SIZE, soft_routing=True, backend="torch")
    module.router.emb = nn.Sequential(nn.Linear(12, 12))
    with pytest.raises(ValueError, match=r"router\.emb needs diff_routing=True"):
        module(torch.randn(1, 4, 4, 12))
    module.router.emb.requires_grad_(False)
    module(torch.randn(1, 4, 4, 12))


@pytest.mark.parametrize("router", [{}, SOFT], ids=["no layer", "router.emb"])
def test_shapes_alone_are_computed_on_the_device_meta(router):
    module = BiLevelRoutingAttention(**SIZE, **router, backend="reference").to("meta")
    assert module(torch.empty(2, 4, 4, 12, device="meta")).shape == (2, 4, 4, 12)


@pytest.mark.parametrize("change", ["hooked", "replaced"])
def test_the_function_calls_a_down_sampling_that_is_not_plain(change):
    kv_down, called = downsampling.build("conv", 12, 12, ratio=2), []
    if change == "replaced":
        kv_down.key = nn.Conv2d(12, 12, 2, stride=2, padding=1, groups=12)
        kv_down.value = nn.Conv2d(12, 12, 2, stride=2, padding=1, groups=12)
    kv_down.key.register_forward_hook(lambda *_: called.append("key"))
    qkv, numbers = torch.randn(1, 8, 8, 36), {"num_heads": 2, "n_win": 2, "topk": 2}
    fused, expected = (
        bi_level_routing_attention(qkv, **numbers, kv_downsampling=kv_down, backend=backend)
        for backend in ("torch", "reference")
    )
    assert torch.equal(fused, expected)
    assert called == ["key", "key"]


def test_a_hooked_down_sampling_for_other_channels_is_refused():
    kv_down, numbers = downsampling.build("conv", 6, 12, ratio=2), {"num_heads": 2, "n_win": 2, "topk": 2}
    kv_down.key.register_forward_hook(lambda *_: None)
    bi_level_routing_attention(torch.randn(1, 8, 8, 24), **numbers, qk_dim=6, kv_downsampling=kv_down)
    with pytest.raises(ValueError, match="kv_downsampling must be for qk_dim=12 and dim=12, got 6 and 12"):
        bi_level_routing_attention(torch.randn(1, 8, 8, 36), **numbers, kv_downsampling=kv_down)


def test_the_originals_projection_in_ours():
    """The original's projection returns two tensors: queries, and keys with values."""
    module = BiLevelRoutingAttention(**SIZE, auto_pad=True, backend="torch")
    x = torch.randn(1, 5, 4, 12)
    expected = module(x)
    theirs = seed_module.QKVLinear(12, 12)
    theirs.load_state_dict(module.qkv.state_dict())
    module.qkv = theirs
    assert torch.equal(module(x), expected)


def test_a_hooked_lepe_in_a_trace():
    module = BiLevelRoutingAttention(**SIZE, auto_pad=True, backend="torch")
    _double(module.lepe)
    x = torch.randn(1, 5, 4, 12)
    assert relative_error(torch.jit.trace(module, x, check_trace=False)(x), module(x).double()) < 1e-5


def test_what_a_lepe_layer_must_return():
    module = BiLevelRoutingAttention(**SIZE, backend="torch")
    module.lepe = nn.Conv2d(12, 12, 3)
    with pytest.raises(ValueError, match=r"lepe must return \(1, 12, 4, 4\), got \(1, 12, 2, 2\)"):
        module(torch.randn(1, 4, 4, 12))


def test_a_replaced_module_may_come_from_the_builder():
    module = BiLevelRoutingAttention(**SIZE, backend="torch")
    module.kv_down = downsampling.build("avgpool", 12, 12, ratio=2)
    other = BiLevelRoutingAttention(**SIZE, **AVERAGED, backend="torch")
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 4, 4, 12)
    assert torch.equal(module(x), other(x))
