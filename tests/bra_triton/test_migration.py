"""`replace_attention` on other implementations: same results; parameters, hooks and attributes are kept."""

import copy
import pickle

import pytest
import torch
from modules import run
from other_implementations import SIZE, AuthorsNCHW, Block, Permuting, original, paste, with_parts_of
from problems import relative_error, worst
from seed_module import TopkRouting
from torch import nn

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, equivalent, replace_attention
from bra_triton.modules.permuted import PermutedBiLevelRoutingAttention

# For the norm of the difference divided by the norm of the result; rounding of float32 gives 1 to 4e-7.
TOLERANCE = 1e-5
SOFT = {"soft_routing": True, "diff_routing": True}
MODES = {
    "default": {},
    "one region": {"n_win": 1, "topk": 1},
    "no LePE": {"side_dwconv": 0},
    "LePE 5": {"side_dwconv": 5},
    "qkv": {"param_attention": "qkv"},
    "narrow keys, another scale": {"qk_dim": 8, "qk_scale": 0.7},
    "soft": {"soft_routing": True},
    "soft_diff": SOFT,
    "param_routing": SOFT | {"param_routing": True},
    "ada_avgpool": {"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2},
    "ada_maxpool": {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 3},
    "avgpool": {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 3},
    "maxpool": {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2},
}


class DepthwiseLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def forward(self, x):
        return self.conv(x)


def clear_map(size):
    """An NHWC map whose regions have different means, so that float32 cannot choose other regions."""
    means = torch.randn(2, 2, 2, 12).repeat_interleave(size[0] // 2 + 1, 1)
    return (
        torch.randn(2, *size, 12) + 2 * means.repeat_interleave(size[1] // 2 + 1, 2)[:, : size[0], : size[1]]
    )


def assert_replaced_by(kind, model, x):
    """Replaces the one attention in the model, and compares outputs and gradients before and after."""
    grad_out = torch.randn_like(x)
    expected, keys = run(model, x, grad_out), model.state_dict().keys()
    report = replace_attention(model, "torch")  # under Triton's interpreter "auto" is slow
    assert [finding.ours.rpartition(".")[2] for finding in report.replaced] == [kind.__name__], str(report)
    assert report.not_replaced == ()
    assert report.model.state_dict().keys() == keys
    actual = run(report.model, x, grad_out)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name].double()) for name in expected}
    assert worst(errors.values()) < TOLERANCE, errors


class TestNumbers:
    @pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["divisible", "padded"])
    @pytest.mark.parametrize("mode", MODES)
    def test_of_the_original_class(self, mode, size):
        attn = original(**SIZE | MODES[mode], auto_pad=size == (5, 7))
        assert_replaced_by(BiLevelRoutingAttention, Block(attn), clear_map(size))

    @pytest.mark.parametrize("mode", ["default", "param_routing", "avgpool"])
    def test_of_a_paste_that_permutes(self, mode):
        """Its layers are those of the NHWC class, so only a trial run shows that it permutes."""
        attn = Permuting(**SIZE | MODES[mode], auto_pad=True)
        assert_replaced_by(PermutedBiLevelRoutingAttention, attn, clear_map((5, 7)).permute(0, 3, 1, 2))

    @pytest.mark.parametrize(
        "lepe", [torch.zeros_like, nn.Conv2d(12, 12, 5, padding=2, groups=12)], ids=["no LePE", "LePE"]
    )
    @pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=["divisible", "padded"])
    def test_of_the_authors_nchw_class(self, size, lepe):
        attn = AuthorsNCHW(**SIZE, lepe=copy.deepcopy(lepe))
        assert_replaced_by(NCHWBiLevelRoutingAttention, attn, clear_map(size).permute(0, 3, 1, 2))

    def test_of_an_nchw_class_that_takes_small_maps(self):
        """Three rows of tokens are fewer than the regions; the authors' class raises an error for them."""
        attn = AuthorsNCHW(**SIZE | {"n_win": 4}, least=1).double()
        assert_replaced_by(NCHWBiLevelRoutingAttention, attn, torch.randn(2, 12, 3, 9, dtype=torch.float64))

    def test_of_a_projection_without_bias(self):
        attn = original(**SIZE, auto_pad=True)
        attn.qkv.qkv = nn.Linear(12, 36, bias=False)
        assert_replaced_by(BiLevelRoutingAttention, attn, clear_map((5, 7)))

    def test_of_a_projection_that_is_one_layer(self):
        """The projection's keys stay `qkv.weight` and `qkv.bias`."""

        def splits_itself(self, x):
            return with_parts_of(self, x, qkv=lambda y: self.qkv(y).split([12, 24], -1))

        attn = paste(splits_itself, qkv=nn.Linear(12, 36))
        assert_replaced_by(BiLevelRoutingAttention, Block(attn), clear_map((6, 8)))

    def test_of_a_paste_that_routes_without_a_router(self):
        def routes_itself(self, x):
            return with_parts_of(self, x, router=TopkRouting(12, topk=3))

        attn = paste(routes_itself, router=None)
        assert_replaced_by(BiLevelRoutingAttention, Block(attn), clear_map((6, 8)))

    @pytest.mark.parametrize(
        ("parent", "name", "layer"),
        [
            ("", "lepe", DepthwiseLayer()),
            ("", "lepe", nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12)),
            ("router", "emb", nn.LayerNorm(12)),
        ],
        ids=["LePE in a layer of its own", "LePE with dilation", "a router with another layer"],
    )
    def test_of_layers_that_kernels_do_not_compute(self, parent, name, layer):
        """Our module calls these layers."""
        attn = original(**SIZE, **SOFT)
        setattr(attn.get_submodule(parent), name, copy.deepcopy(layer))
        assert_replaced_by(BiLevelRoutingAttention, Block(attn), clear_map((6, 8)))

    def test_the_attention_matrix_of_a_paste_that_permutes(self):
        """The trial run does not compare results with `ret_attn_mask`."""
        attn, x = Permuting(**SIZE), clear_map((6, 8)).permute(0, 3, 1, 2)
        expected, actual = attn(x, True), replace_attention(attn).model(x, True)
        assert torch.equal(actual[2], expected[2])
        assert worst(relative_error(actual[i], expected[i].double()) for i in (0, 1, 3)) < TOLERANCE


# Places of an attention in a model: how to build the model, how to find the attention in it, and its name.
PLACES = {
    "root": (lambda attn: attn, lambda model: model, ""),
    "attribute": (Block, lambda model: model.attn, "attn"),
    "Sequential": (lambda attn: nn.Sequential(nn.Identity(), attn), lambda model: model[1], "1"),
    "ModuleList": (lambda attn: nn.ModuleList([attn]), lambda model: model[0], "0"),
    "ModuleDict": (lambda attn: nn.ModuleDict({"a": attn}), lambda model: model["a"], "a"),
    "deep": (
        lambda attn: nn.Sequential(Block(nn.Sequential(attn))),
        lambda model: model[0].attn[0],
        "0.attn.0",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place(place):
    around, find, name = PLACES[place]
    report = replace_attention(around(original(**SIZE)))
    assert type(find(report.model)) is BiLevelRoutingAttention
    assert [finding.name for finding in report.replaced] == [name]


def test_ours_are_not_looked_at():
    """Neither those that were built as ours nor those that were replaced."""
    model = nn.ModuleList([original(**SIZE), AuthorsNCHW(**SIZE), Permuting(**SIZE)])
    replace_attention(model)
    model.append(BiLevelRoutingAttention(**SIZE))
    report = replace_attention(model)
    assert report.replaced == report.not_replaced == ()


def test_a_shared_module_stays_one_object():
    attn = original(**SIZE)
    report = replace_attention(nn.ModuleList([attn, Block(attn), original(**SIZE)]))
    first, block, other = report.model
    assert first is block.attn
    assert first is not other
    assert [finding.name for finding in report.replaced] == ["0, 1.attn", "2"]


class TestTrials:
    """A trial takes seconds where maps are large, and a network has many modules that are alike."""

    @pytest.fixture
    def trials(self, monkeypatch):
        made, copy_of = [], equivalent._trial_copy
        monkeypatch.setattr(equivalent, "_trial_copy", lambda module: made.append(module) or copy_of(module))
        return made

    def test_serve_modules_that_differ_in_their_weights_alone(self, trials):
        alike = [original(**SIZE), original(**SIZE).half().eval(), original(**SIZE)]
        alike[2].register_forward_hook(lambda module, args, out: None)
        assert len(replace_attention(nn.ModuleList(alike)).replaced) == 3
        assert len(trials) == 1

    def test_do_not_serve_others(self, trials):
        """Of the pastes, which have the same class, the second gives another result."""

        class Factor(nn.Module):
            def forward(self, x):
                return self.factor * original.forward(self, x)

        pastes = [Factor() for _ in range(2)]
        for attn, factor in zip(pastes, (1, 2), strict=True):
            vars(attn).update(vars(original(**SIZE)), factor=factor)
        others = [
            original(**SIZE),
            original(**SIZE | {"topk": 2}),
            original(**SIZE, side_dwconv=5),
            original(**SIZE),
            AuthorsNCHW(**SIZE),
        ]
        others[3].lepe.padding_mode = "circular"
        report = replace_attention(nn.ModuleList([*pastes, *others]))
        assert len(trials) == 7
        assert [finding.name for finding in report.not_replaced] == ["1"]


class TestWhatIsKept:
    def test_parameters_modes_and_the_generators_state(self):
        attn = original(**SIZE, param_routing=True, **SOFT).bfloat16().train()
        attn.wo.eval().requires_grad_(False)
        attn.lepe.weight.requires_grad_(False)
        parameters = dict(attn.named_parameters())
        flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        values = {name: parameter.clone() for name, parameter in parameters.items()}
        state = torch.get_rng_state()
        with torch.no_grad():  # the trial needs gradients
            ours = replace_attention(attn).model
        assert type(ours) is BiLevelRoutingAttention
        assert torch.equal(torch.get_rng_state(), state)
        for name, parameter in ours.named_parameters():
            assert parameter is parameters[name]
            assert torch.equal(parameter, values[name])
            assert parameter.requires_grad == flags[name]
        assert {name: m.training for name, m in ours.named_modules() if name in ("", "router", "wo")} == {
            "": True,
            "router": True,
            "wo": False,
        }
        assert not replace_attention(original(**SIZE).eval()).model.training

    @pytest.mark.parametrize("kind", [original, AuthorsNCHW])
    def test_the_order_of_the_parameters(self, kind):
        """The state_dict of an optimizer numbers the parameters; a copied version may make LePE last."""
        attn = kind(**SIZE)
        attn.lepe = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        attn._modules["lepe"] = attn._modules.pop("lepe")
        names = [name for name, _ in attn.named_parameters()]
        ours = replace_attention(attn).model
        assert type(ours) is not kind
        assert [name for name, _ in ours.named_parameters()] == names

    def test_nothing_is_lost_by_inference_mode(self):
        """The trial run needs gradients, which tensors made in inference mode never have."""
        with torch.inference_mode():
            ours = replace_attention(original(**SIZE)).model
            assert type(ours) is BiLevelRoutingAttention
            ours(clear_map((6, 8)))

    def test_nothing_is_lost_by_another_default_device(self):
        """The trial run is on the CPU. "meta" stands for a GPU, as many scripts set it."""
        attn = original(**SIZE)
        with torch.device("meta"):
            assert type(replace_attention(attn).model) is BiLevelRoutingAttention

    def test_nothing_of_the_original_prevents_pickling(self):
        """Without LePE the original holds a lambda, which cannot be pickled."""
        ours = replace_attention(original(**SIZE, side_dwconv=0)).model
        assert type(pickle.loads(pickle.dumps(ours))) is BiLevelRoutingAttention

    def test_hooks_with_their_handles(self):
        """The trial run calls no hook."""
        attn, calls = original(**SIZE), []
        handles = [
            attn.register_forward_pre_hook(lambda module, args: calls.append("pre")),
            attn.register_forward_hook(
                lambda module, args, kwargs, out: calls.append("out"), with_kwargs=True
            ),
            attn.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward")),
            attn.wo.register_forward_hook(lambda module, args, out: calls.append("wo")),
        ]
        report = replace_attention(Block(attn))
        assert calls == []
        assert report.replaced[0].note == ""
        x = clear_map((6, 8))
        report.model(x).sum().backward()
        assert calls == ["pre", "wo", "out", "backward"]
        for handle in handles:
            handle.remove()
        report.model(x)
        assert len(calls) == 4

    def test_hooks_of_layers_that_ours_does_not_call_are_named(self):
        attn = original(**SIZE)
        for layer in (
            attn.lepe,
            attn.router,
            attn.router.emb,
            attn.kv_gather,
            attn.qkv,
            attn.wo,
            attn.qkv.qkv,
        ):
            layer.register_forward_hook(lambda module, args, out: None)
        note = replace_attention(attn).replaced[0].note
        assert note == "hooks not called any more on kv_gather, qkv"

    def test_hooks_on_router_and_pooling(self):
        """Router and pooling layer are built anew; their hooks are moved and called as before."""
        attn, calls = original(**SIZE, kv_downsample_mode="avgpool", kv_downsample_ratio=2), []
        for name in ("router", "kv_down", "lepe"):
            layer = getattr(attn, name)
            layer.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
        report = replace_attention(attn)
        assert report.replaced[0].note == ""
        report.model(clear_map((6, 8)))
        assert sorted(calls) == ["kv_down", "lepe", "router"]

    def test_attributes_that_others_set_or_read(self):
        """Ultralytics sets `i`, `f` and `type` on every layer of a model; `nn.Module` has a method `type`."""
        attn = original(**SIZE)
        attn.i, attn.f, attn.type = 3, -1, "somebody.Attention"
        ours = replace_attention(nn.Sequential(attn)).model[0]
        assert (ours.i, ours.f, ours.type, ours.num_heads, ours.scale) == (3, -1, attn.type, 2, 12**-0.5)

    def test_the_backend_that_was_asked_for(self):
        model = nn.ModuleList([original(**SIZE), AuthorsNCHW(**SIZE), Permuting(**SIZE)])
        model[1].attn_backend = "torch"  # the authors' argument, which a copy may keep
        assert [ours.backend for ours in replace_attention(model, "reference").model] == ["reference"] * 3
