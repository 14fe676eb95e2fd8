"""What `replace_attention` leaves alone and why, and what its report says."""

import pytest
import torch
import torch.nn.functional as F
from other_implementations import SIZE, AuthorsNCHW, Block, original, paste, with_parts_of
from seed_module import KVGather
from torch import nn

from bra_triton import BiLevelRoutingAttention, replace_attention


class Subclass(original):
    """Gives the same result, and records the input's shape."""

    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)


def with_(change, **arguments):
    """An original module with a change."""
    attn = original(**SIZE | arguments)
    change(attn)
    return attn


def raises(self, x):
    raise RuntimeError("the first line\nand more")


def asserts(self, x):
    raise AssertionError


def pads_always(self, x):
    out = original.forward(self, F.pad(x, (0, 0, 0, -x.shape[2] % 2, 0, -x.shape[1] % 2)))
    return out[:, : x.shape[1], : x.shape[2]]


def pads_whole_maps(self, x):
    """Forgets that a map of whole regions needs no padding; all other maps are padded as in the original."""
    bottom, right = (self.n_win - side % self.n_win for side in x.shape[1:3])
    out = original.forward(self, F.pad(x, (0, 0, 0, right, 0, bottom)))
    return out[:, : x.shape[1], : x.shape[2]]


def skips_small_maps(self, x):
    return x if min(x.shape[1:3]) < self.n_win else original.forward(self, x)


def routes_to_the_first(self, x):
    def route(query, key):
        return None, torch.arange(3).expand(*query.shape[:2], 3)

    return with_parts_of(self, x, router=route)


def detached(self, x):
    return original.forward(self, x.detach() + 0 * x)


NOT_REPLACED = {
    "a subclass with its own forward": (lambda: Subclass(**SIZE), "overrides the forward of BiLevelRouting"),
    "a forward set on the object": (lambda: with_(lambda m: setattr(m, "forward", m.forward)), "overrides"),
    "one more input": (
        lambda: paste(lambda self, x, guide=None: original.forward(self, x)),
        "its forward takes guide, which ours does not",
    ),
    "dropout as a layer": (
        lambda: paste(lambda self, x: self.drop(original.forward(self, x)), drop=nn.Dropout(1e-6)),
        "its forward draws random numbers, as dropout does",
    ),
    "dropout as a function": (
        lambda: paste(lambda self, x: F.dropout(original.forward(self, x), 1e-6, self.training)),
        "its forward draws random numbers, as dropout does",
    ),
    "another result in eval": (
        lambda: paste(lambda self, x: original.forward(self, x) * (1 if self.training else 2)),
        "the output differs in eval",
    ),
    "the same output, another gradient": (lambda: paste(detached), "the gradient of the map differs"),
    "another shape": (
        lambda: paste(lambda self, x: original.forward(self, x)[:1]),
        "the output has shape (1, 4, 6, 12), ours (2, 4, 6, 12)",
    ),
    "two results": (
        lambda: paste(lambda self, x: (original.forward(self, x), None)),
        "TypeError: its forward returns a tuple, ours a tensor",
    ),
    "one more parameter": (
        lambda: with_(lambda m: m.register_parameter("gamma", nn.Parameter(torch.ones(12)))),
        "ours does not have its parameters or buffers gamma",
    ),
    "a few more layers": (
        lambda: with_(lambda m: setattr(m, "offset", nn.Sequential(nn.Linear(12, 2), nn.BatchNorm1d(2)))),
        "buffers offset.0.bias, offset.0.weight, offset.1.bias, offset.1.num_batches_tracked and 3 more",
    ),
    "fewer parameters": (
        lambda: with_(lambda m: setattr(m, "kv_downsample_mode", "conv")),
        "it does not have our parameters or buffers kv_down.",
    ),
    "one more buffer": (
        lambda: with_(lambda m: m.register_buffer("mean", torch.ones(12), persistent=False)),
        "ours does not have its parameters or buffers mean",
    ),
    "LePE by a function": (
        lambda: with_(lambda m: setattr(m, "lepe", torch.ones_like), side_dwconv=0),
        "the output differs",
    ),
    "another pooling": (
        lambda: with_(lambda m: setattr(m, "kv_down", nn.LPPool2d(2, 2))),
        "the output differs",
    ),
    "another number of regions than it says": (
        lambda: with_(lambda m: setattr(m, "topk", 2)),
        "the output differs",
    ),
    "a scale that is learnt": (
        lambda: with_(lambda m: (delattr(m, "scale"), setattr(m, "scale", nn.Parameter(torch.ones(()))))),
        "ours does not have its parameters or buffers scale",
    ),
    "a setting that ours does not have": (
        lambda: with_(lambda m: setattr(m, "param_attention", "none")),
        "ValueError: param_attention must be one of",
    ),
    "a mode that the original does not compute": (
        lambda: original(**SIZE, diff_routing=True),
        "NotImplementedError: differentiable hard routing TBA",
    ),
    "an assertion without a text": (lambda: paste(asserts), "(2, 12, 4, 6), AssertionError"),
    "a forward that raises": (lambda: paste(raises), "RuntimeError: the first line"),
    "other names for its settings": (
        lambda: with_(lambda m: [setattr(m, f"its_{n}", vars(m).pop(n)) for n in ("n_win", "topk")]),
        "it has no attribute n_win and no topk, which ours needs",
    ),
    "no projection": (lambda: with_(lambda m: delattr(m, "qkv")), "it has no layer qkv.qkv, which ours"),
    "no output projection": (lambda: with_(lambda m: delattr(m, "wo")), "it has no layer wo, which ours"),
    "another routing, without a router": (
        lambda: paste(routes_to_the_first, router=None),
        "the output differs in training",
    ),
    "padding without auto_pad=True": (
        lambda: paste(pads_always),
        "on a map (2, 3, 5, 12), it raises no error, although it has no auto_pad=True",
    ),
    "padding of maps that need none": (
        lambda: paste(pads_whole_maps, auto_pad=True),
        "on a map (2, 4, 6, 12), the output differs in training",
    ),
    "another result on small maps": (
        lambda: paste(skips_small_maps, auto_pad=True),
        "on a map (2, 1, 1, 12), the output differs in training",
    ),
    "small maps without auto_pad=True": (
        lambda: paste(skips_small_maps),
        "on a map (2, 1, 1, 12), it raises no error, although it has no auto_pad=True",
    ),
    "weights that are not there yet": (
        lambda: original(**SIZE).to("meta"),
        "NotImplementedError: Cannot copy",
    ),
    "hooks on its state_dict": (
        lambda: with_(lambda m: m.register_state_dict_pre_hook(lambda *_: None)),
        "it has hooks on its state_dict",
    ),
    "NHWC in, NCHW out": (
        lambda: paste(lambda self, x: original.forward(self, x).permute(0, 3, 1, 2)),
        "compared with BiLevelRoutingAttention on a map (2, 4, 6, 12), the output has shape (2, 12, 4, 6), "
        "ours (2, 4, 6, 12); compared with PermutedBiLevelRoutingAttention on a map (2, 12, 4, 6), "
        "RuntimeError: mat1 and mat2",
    ),
    "the authors' NCHW class with another LePE": (
        lambda: AuthorsNCHW(**SIZE, lepe=torch.ones_like),
        "compared with NCHWBiLevelRoutingAttention on a map (2, 12, 4, 6), the output differs",
    ),
}


@pytest.mark.parametrize("case", NOT_REPLACED)
def test_what_is_not_the_same_is_left_alone_and_says_why(case):
    build, reason = NOT_REPLACED[case]
    attn = build()
    model = nn.Sequential(attn)
    report = replace_attention(model)
    assert model[0] is attn
    assert report.replaced == ()
    (finding,) = report.not_replaced
    assert reason in finding.note
    assert "\n" not in finding.note
    assert not finding.note.endswith(": ")


@pytest.mark.parametrize("compiled", [torch.compile, lambda m: m.compile() or m], ids=["wrapper", "method"])
def test_a_compiled_module_is_left_alone_because_it_would_still_be_called(compiled):
    """A model or a block that is compiled as a whole is another case: it calls the modules that it holds."""
    report = replace_attention(nn.Sequential(compiled(original(**SIZE))))
    assert report.replaced == ()
    (finding,) = report.not_replaced
    assert finding.note == "it is compiled by itself; call replace_attention before it is compiled"


class TestSubclasses:
    def test_are_replaced_if_told_so_and_equal(self):
        report = replace_attention(Subclass(**SIZE), subclasses=True)
        assert type(report.model) is BiLevelRoutingAttention
        patched = with_(lambda m: setattr(m, "forward", m.forward))
        ours = replace_attention(patched, subclasses=True).model
        assert "forward" not in vars(ours)

    def test_are_left_alone_if_not_equal(self):
        other = type("Other", (original,), {"forward": lambda self, x: 2 * original.forward(self, x)})
        report = replace_attention(other(**SIZE), subclasses=True)
        assert "the output differs" in report.not_replaced[0].note


@pytest.mark.parametrize(
    ("name", "layer"), [("drop", nn.Dropout(0.0)), ("gather", KVGather()), ("unused", nn.GELU())]
)
def test_layers_without_parameters_are_no_obstacle(name, layer):
    """A pasted copy may name them in another way; the trial shows whether they change the result."""

    def forward(self, x):
        if name == "gather":
            return with_parts_of(self, x, kv_gather=self.gather)
        return self.drop(original.forward(self, x)) if name == "drop" else original.forward(self, x)

    assert len(replace_attention(paste(forward, **{name: layer})).replaced) == 1


def test_our_own_modules_and_what_holds_one_are_not_looked_at():
    """The wrapper that torch.compile makes has the attributes of the module inside."""
    compiled = torch.compile(Block(original(**SIZE)))
    block = type("BiLevelRoutingAttentionBlock", (Block,), {})(original(**SIZE))
    report = replace_attention(nn.ModuleList([BiLevelRoutingAttention(**SIZE), compiled, block]))
    assert [finding.name for finding in report.replaced] == ["1._orig_mod.attn", "2.attn"]
    assert replace_attention(report.model).replaced == replace_attention(report.model).not_replaced == ()


def test_the_report_is_readable_and_frozen():
    attn = original(**SIZE)
    attn.kv_gather.register_forward_hook(lambda module, args, out: None)
    report = replace_attention(nn.ModuleList([attn, Subclass(**SIZE)]))
    assert str(report).splitlines() == [
        "replaced: 1",
        "  0: seed_module.BiLevelRoutingAttention -> bra_triton.modules.nhwc.BiLevelRoutingAttention: "
        "hooks not called any more on kv_gather",
        "not replaced: 1",
        "  1: test_migration_refusals.Subclass: it overrides the forward of BiLevelRoutingAttention; "
        "subclasses=True replaces it if the result is the same",
    ]
    with pytest.raises(AttributeError):
        report.model = None
    assert str(replace_attention(original(**SIZE))).splitlines()[1].startswith("  (the model): seed_module")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "model must be an nn.Module, got 'model'"),
        ((nn.Identity(), "cuda"), ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        replace_attention(*arguments)
    with pytest.raises(ValueError, match="subclasses must be True or False, got 'no'"):
        replace_attention(nn.Identity(), subclasses="no")
