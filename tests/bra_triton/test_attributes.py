"""The original's attributes on our modules: all can be read; setting one takes effect or raises an error."""

import dataclasses
import pickle

import pytest
import seed_module
import torch
from problems import relative_error
from torch import nn

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.modules import downsampling
from bra_triton.modules.nhwc import TopkRouting

SIZE = {"dim": 12, "num_heads": 2, "n_win": 2, "topk": 2}
# Not compared: two modules of the original's that only its gathering and softmax use.
NOT_HERE = {"kv_gather", "attn_act"}
# For each attribute the value to set, and constructor arguments without which it would make no difference.
SETTINGS = {
    "n_win": (4, {}),
    "num_heads": (3, {}),
    "topk": (4, {}),
    "scale": (2.5, {}),
    "soft_routing": (True, {}),
    "auto_pad": (True, {}),
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qk_dim": 8, "qk_scale": 0.3, "param_attention": "qkv"},
        {"soft_routing": True, "diff_routing": True, "param_routing": True, "auto_pad": True},
        {"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2},
        {"side_dwconv": 0},
    ],
)
def test_are_those_of_the_original(arguments):
    original = seed_module.BiLevelRoutingAttention(**SIZE, **arguments)
    ours = BiLevelRoutingAttention(**SIZE, **arguments)
    if arguments.get("side_dwconv") == 0:  # the original then has a function that returns zeros
        assert ours.lepe is None
        del original.lepe
    for theirs, mine in ((original, ours), (original.router, ours.router)):
        names = {name for name in vars(theirs) if not name.startswith("_")} - NOT_HERE
        assert {name: getattr(mine, name) for name in names} == {
            name: getattr(theirs, name) for name in names
        }
    for name, _ in original.named_children():
        assert name in NOT_HERE or name in dict(ours.named_children())


def test_are_those_of_the_authors_nchw_form():
    module = NCHWBiLevelRoutingAttention(24, 3, 5, topk=2)
    names = ("dim", "num_heads", "head_dim", "scale", "topk", "n_win")
    assert [getattr(module, name) for name in names] == [24, 3, 8, 24**-0.5, 2, 5]


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
@pytest.mark.parametrize("name", SETTINGS)
def test_setting_has_the_effect_of_the_constructors_argument(name, kind):
    if kind is NCHWBiLevelRoutingAttention and name == "soft_routing":
        pytest.skip("it has no routing weights")
    (value, others), argument = SETTINGS[name], "qk_scale" if name == "scale" else name
    set_later = kind(**SIZE, **others, backend="torch")
    built = kind(**{**SIZE, **others, argument: value}, backend="torch")
    built.load_state_dict(set_later.state_dict())
    x = torch.randn(1, 8, 8, 12)
    x = x if kind is BiLevelRoutingAttention else x.permute(0, 3, 1, 2)
    before = set_later(x)
    setattr(set_later, name, value)
    assert getattr(set_later, name) == getattr(built, name) == value
    assert torch.equal(set_later(x), built(x))
    if name != "auto_pad":
        assert not torch.equal(set_later(x), before)


def test_the_scale_of_the_tokens_alone_is_set_as_in_the_original():
    original, ours = (
        kind(**SIZE, soft_routing=True).double()
        for kind in (seed_module.BiLevelRoutingAttention, BiLevelRoutingAttention)
    )
    ours.load_state_dict(original.state_dict())
    original.scale = ours.scale = 2.5
    assert ours.router.scale == original.router.scale == 12**-0.5
    x = torch.randn(1, 8, 8, 12, dtype=torch.float64)
    assert relative_error(ours(x), original(x)) < 1e-12


class _OwnRouter(TopkRouting):
    """A router of a user's own that is built on ours."""


@pytest.mark.parametrize("kind", [TopkRouting, _OwnRouter])
def test_the_router_follows_the_attention(kind):
    module = BiLevelRoutingAttention(**SIZE)
    module.router = kind(module.spec, param_routing=False)
    module.topk = 3
    module.diff_routing = True
    assert (module.router.topk, module.router.diff_routing) == (3, True)
    _, _, r_idx, _ = module(torch.randn(1, 4, 4, 12), ret_attn_mask=True)
    assert r_idx.shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dim", "dim cannot be set, got 7: it determines the parameters' shapes"),
        ("qk_dim", "qk_dim cannot be set"),
        ("qk_scale", "qk_scale cannot be set, got 7: set scale"),
        ("side_dwconv", "side_dwconv cannot be set, got 7: lepe holds this setting"),
        ("param_attention", "param_attention cannot be set"),
        ("param_routing", "param_routing cannot be set"),
        (
            "kv_downsample_mode",
            "kv_downsample_mode cannot be set, got 7: kv_down holds this setting; replace kv_down",
        ),
        ("kv_per_win", "kv_per_win cannot be set"),
        ("kv_gather", "kv_gather cannot be set, got 7: no backend calls it"),
        ("attn_act", "attn_act cannot be set"),
        ("router.topk", "topk cannot be set, got 7: set it on the attention"),
        ("router.scale", "scale cannot be set"),
        ("router.spec", "spec cannot be set, got 7: set it on the attention"),
        ("router.routing_act", "routing_act cannot be set"),
    ],
)
def test_what_would_have_no_effect_is_refused(path, message):
    module = BiLevelRoutingAttention(**SIZE)
    parent, _, name = path.rpartition(".")
    with pytest.raises(AttributeError, match=message):
        setattr(module.get_submodule(parent), name, 7)
    # Without the refusal nn.Module would register the Parameter.
    with pytest.raises(AttributeError, match=message.partition(",")[0]):
        setattr(module.get_submodule(parent), name, nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize(
    "name", ["head_dim", "attn_fn", "soft_routing", "diff_routing", "qk_scale", "side_dwconv", "attn_backend"]
)
def test_what_would_have_no_effect_on_the_nchw_form_is_refused(name):
    with pytest.raises(AttributeError, match=f"{name} cannot be set"):
        setattr(NCHWBiLevelRoutingAttention(12, 2), name, True)


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_a_new_specification_suits_the_parameters(kind):
    module = kind(**SIZE)
    module.spec = dataclasses.replace(module.spec, topk=3)
    assert module.topk == 3
    with pytest.raises(TypeError, match="spec must be an AttentionSpec, got 3"):
        module.spec = 3
    for name in ("dim", "qk_dim"):
        with pytest.raises(ValueError, match=rf"spec must keep dim=12 and qk_dim=12, .*, got .*\b{name}=24"):
            module.spec = dataclasses.replace(module.spec, **{name: 24})


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("ada_avgpool", name) for name in ("kv_per_win", "mode", "qk_dim", "dim")),
        ("avgpool", "ratio"),
        ("fracpool", "ratio"),  # another attribute holds the ratio as a fraction
        ("fracpool", "kernel"),
        ("conv", "ratio"),  # the layers' strides would stay
        ("conv", "kernel"),
    ],
)
def test_a_down_sampling_is_made_anew_not_set(mode, name):
    module = downsampling.build(mode, 12, 12, ratio=2)
    with pytest.raises(AttributeError, match=f"{name} cannot be set, got 3: make a new module by downsam"):
        setattr(module, name, 3)


@pytest.mark.parametrize("kind", [BiLevelRoutingAttention, NCHWBiLevelRoutingAttention])
def test_what_is_listed_as_settable_can_be_set(kind):
    module = kind(**SIZE)
    settable = module.settable()
    assert {"topk", "scale", "auto_pad", "backend"} <= settable.keys()
    for name, value in settable.items():
        setattr(module, name, value)


def test_a_routers_layer_needs_gradients_through_the_routing():
    module = BiLevelRoutingAttention(**SIZE, param_routing=True, diff_routing=True)
    with pytest.raises(ValueError, match="param_routing=True needs diff_routing=True"):
        module.diff_routing = False
    assert module.diff_routing


def test_a_pickle_of_version_0_1_0_is_read():
    """Such a pickle lacks the attributes that later versions added."""
    module = BiLevelRoutingAttention(**SIZE, backend="torch")
    for name in [name for name in vars(module) if name.startswith(("kv_", "param_"))]:
        if name != "kv_downsample_mode":
            del vars(module)[name]
    copied, x = pickle.loads(pickle.dumps(module)), torch.randn(1, 8, 8, 12)
    assert torch.equal(copied(x), module(x))
    copied.topk = 3
    assert copied.router.topk == 3
