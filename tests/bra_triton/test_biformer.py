"""BiFormer: the authors' checkpoint keys and results, and torchvision's heads on its maps."""

import sys
from collections import OrderedDict

import pytest
import seed_module
import torch
import torch.nn.functional as F
from problems import relative_error, worst
from tiny_biformer import SIZE, TINY
from torch import nn
from torch.func import functional_call
from torchvision.models.detection.retinanet import AnchorGenerator, RetinaNet
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth

from bra_triton import BiLevelRoutingAttention, biformer
from bra_triton.biformer import BiFormer, BiFormerBackbone, DenseAttention


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # interpreted, a model takes minutes


def with_random_weights(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with random weights and random statistics of the batch norms."""
    for value in model.double().state_dict().values():
        if value.dtype == torch.float64:
            value.copy_(0.3 * torch.rand_like(value) + (0.7 if value.ndim == 1 else -0.15))
    return model.eval()


def shapes_of_the_authors(depth, embed_dim):
    """Names and shapes in the `state_dict` of the authors' models with `topks=[1, 4, 16, -2]`."""

    def norm(dim):
        return {"weight": (dim,), "bias": (dim,)}

    def batch_norm(dim):
        return {**norm(dim), "running_mean": (dim,), "running_var": (dim,), "num_batches_tracked": ()}

    def linear(c1, c2, *kernel):
        return {"weight": (c2, c1, *kernel), "bias": (c2,)}

    def block(dim, is_dense):
        routed = {"lepe": linear(1, dim, 5, 5), "qkv.qkv": linear(dim, 3 * dim), "wo": linear(dim, dim)}
        dense = {"qkv": {"weight": (3 * dim, dim)}, "proj": linear(dim, dim), "lepe": linear(1, dim, 5, 5)}
        return {
            "pos_embed": linear(1, dim, 3, 3),
            "norm1": norm(dim),
            **{f"attn.{name}": layer for name, layer in (dense if is_dense else routed).items()},
            "norm2": norm(dim),
            "mlp.0": linear(dim, 3 * dim),
            "mlp.3": linear(3 * dim, dim),
        }

    half = embed_dim[0] // 2
    layers = {
        "downsample_layers.0.0": linear(3, half, 3, 3),
        "downsample_layers.0.1": batch_norm(half),
        "downsample_layers.0.3": linear(half, embed_dim[0], 3, 3),
        "downsample_layers.0.4": batch_norm(embed_dim[0]),
    }
    for i in (1, 2, 3):
        layers[f"downsample_layers.{i}.0"] = linear(embed_dim[i - 1], embed_dim[i], 3, 3)
        layers[f"downsample_layers.{i}.1"] = batch_norm(embed_dim[i])
    for i in range(4):
        for j in range(depth[i]):
            layers |= {f"stages.{i}.{j}.{name}": s for name, s in block(embed_dim[i], i == 3).items()}
    layers |= {"norm": batch_norm(embed_dim[3]), "head": linear(embed_dim[3], 1000)}
    return {f"{layer}.{name}": shape for layer, all_ in layers.items() for name, shape in all_.items()}


@pytest.mark.parametrize(
    ("name", "depth", "embed_dim", "parameters"),
    [
        # The authors' README states 13.1, 25.5 and 56.8 million.
        ("biformer_tiny", (2, 2, 8, 2), (64, 128, 256, 512), 13_142_760),
        ("biformer_small", (4, 4, 18, 4), (64, 128, 256, 512), 25_536_232),
        ("biformer_base", (4, 4, 18, 4), (96, 192, 384, 768), 56_804_968),
    ],
)
def test_released_checkpoints_have_the_names_and_shapes_of_our_state_dict(name, depth, embed_dim, parameters):
    with torch.device("meta"):
        model = getattr(biformer, name)()
    actual = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert actual == shapes_of_the_authors(depth, embed_dim)
    assert sum(value.numel() for value in model.parameters()) == parameters


class AuthorsBiFormer:
    """The authors' forward in eval mode, as functions of a `state_dict`."""

    def __init__(self, state, **arguments):
        self.state, self.arguments = state, arguments

    def conv(self, name, x, **options):
        weight = self.state[f"{name}.weight"]
        options = {"groups": x.shape[1] // weight.shape[1], "padding": weight.shape[-1] // 2, **options}
        return F.conv2d(x, weight, self.state[f"{name}.bias"], **options)

    def batch_norm(self, name, x):
        values = (
            self.state[f"{name}.{value}"] for value in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, *values)

    def layer_norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def dense(self, name, x, has_lepe):
        qkv = self.linear(f"{name}.qkv", x)
        q, k, v = (t.flatten(1, 2).unflatten(-1, (8, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        scores = (q @ k.mT) * (x.shape[-1] // 8) ** -0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        if has_lepe:
            out = out + self.conv(f"{name}.lepe", x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.linear(f"{name}.proj", out)

    def routed(self, name, x, topk):
        dim, own = x.shape[-1], f"{name}."
        seed = seed_module.BiLevelRoutingAttention(
            dim, dim // TINY["head_dim"], TINY["n_win"], topk=topk, side_dwconv=5, **self.arguments
        )
        state = {key.removeprefix(own): value for key, value in self.state.items() if key.startswith(own)}
        return functional_call(seed.double(), state, x, strict=True)

    def block(self, name, x, topk):
        x = (x + self.conv(f"{name}.pos_embed", x)).permute(0, 2, 3, 1)
        y = self.layer_norm(f"{name}.norm1", x)
        y = self.dense(f"{name}.attn", y, topk == -2) if topk < 0 else self.routed(f"{name}.attn", y, topk)
        x = x + self.state.get(f"{name}.gamma1", 1) * y
        y = self.linear(
            f"{name}.mlp.3", F.gelu(self.linear(f"{name}.mlp.0", self.layer_norm(f"{name}.norm2", x)))
        )
        return (x + self.state.get(f"{name}.gamma2", 1) * y).permute(0, 3, 1, 2)

    def __call__(self, x, topks):
        for i, (blocks, topk) in enumerate(zip(TINY["depth"], topks, strict=True)):
            name = f"downsample_layers.{i}"
            x = self.batch_norm(f"{name}.1", self.conv(f"{name}.0", x, stride=2))
            if i == 0:
                x = self.batch_norm(f"{name}.4", self.conv(f"{name}.3", F.gelu(x), stride=2))
            for j in range(blocks):
                x = self.block(f"stages.{i}.{j}", x, topk)
        return self.linear("head", self.batch_norm("norm", x).mean((2, 3)))


@pytest.mark.parametrize(
    ("topks", "size", "arguments", "scale"),
    [
        ((1, 2, 4, -2), SIZE, {}, 0.0),
        # Dense attention without LePE, layer scale, and a map of 15 x 23 tokens, then one of 8 x 12.
        ((-1, 2, -2, -1), (60, 90), {"auto_pad": True}, 0.1),
        ((3, 2, 4, -2), SIZE, {"diff_routing": True, "soft_routing": True}, 0.0),
    ],
    ids=["released", "others, padded", "soft routing"],
)
def test_outputs_and_gradients_are_those_of_the_authors_network(topks, size, arguments, scale):
    settings = {**TINY, "topks": topks, "layer_scale_init_value": scale, **arguments}
    model = with_random_weights(BiFormer(**settings, backend="torch"))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    out, expected = model(image), AuthorsBiFormer(state, **arguments)(image, topks)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected.backward(grad_out)
    errors = {name: relative_error(p.grad, state[name].grad) for name, p in model.named_parameters()}
    errors["out"] = relative_error(out, expected)
    # Rounding of float64, 1e-16, accumulates in the forward and backward of five blocks.
    assert worst(errors.values()) < 1e-11, errors


def test_backbone_takes_a_classifiers_weights_and_normalises_its_maps():
    classifier = with_random_weights(BiFormer(**TINY, auto_pad=True))
    arguments = {name: value for name, value in TINY.items() if name != "num_classes"}
    backbone = BiFormerBackbone(**arguments).double().eval()
    missing, unexpected = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert {key.split(".")[0] for key in missing} == {"extra_norms"}
    assert {key.split(".")[0] for key in unexpected} == {"head", "norm"}
    image = torch.randn(2, 3, 60, 90, dtype=torch.float64)  # the first map, 15 x 23, needs padding
    for actual, stage_map in zip(backbone(image), classifier.stage_maps(image), strict=True):
        # `extra_norms` still have their initial weight 1 and bias 0.
        expected = (stage_map - stage_map.mean(1, True)) / (stage_map.var(1, False, True) + 1e-6).sqrt()
        torch.testing.assert_close(actual, expected)


class Pyramid(nn.Module):
    """A backbone for torchvision's detectors: returns a dictionary of maps with `out_channels` each."""

    out_channels = 16

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramidNetwork(backbone.embed_dim, self.out_channels)

    def forward(self, x):
        return self.pyramid(OrderedDict(zip("0123", self.backbone(x), strict=True)))


def learns(loss, model):
    loss.backward()
    assert torch.isfinite(loss)
    return [
        name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()
    ]


def test_backbone_serves_a_detector_of_torchvision():
    arguments = {name: value for name, value in TINY.items() if name != "num_classes"}
    anchors = AnchorGenerator(((16,), (32,), (64,), (64,)), ((1.0,),) * 4)
    sizes = {"min_size": 64, "max_size": 96}
    detector = RetinaNet(Pyramid(BiFormerBackbone(**arguments)), 2, anchor_generator=anchors, **sizes)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 60, 90)], [target])
    assert learns(sum(losses.values()), detector) == []
    assert detector.eval()([torch.rand(3, 50, 70)])[0].keys() == {"boxes", "scores", "labels"}


def test_backbone_serves_a_segmentation_head_of_torchvision():
    arguments = {name: value for name, value in TINY.items() if name != "num_classes"}
    backbone, head = BiFormerBackbone(**arguments, drop_path_rate=0.5), FCNHead(24, 3)
    logits = F.interpolate(head(backbone(torch.rand(2, 3, 60, 90))[-1]), (60, 90), mode="bilinear")
    loss = F.cross_entropy(logits, torch.randint(3, (2, 60, 90)))
    # Only the last map reaches this head, so the other maps' norms get no gradient.
    unused = {f"backbone.extra_norms.{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    assert set(learns(loss, nn.ModuleDict({"backbone": backbone, "head": head}))) == unused


def test_probability_to_skip_a_block_grows_with_the_depth():
    model = BiFormer(**TINY, drop_path_rate=0.4)
    drops = [block.drop_path for stage in model.stages for block in stage]
    assert type(drops[0]) is nn.Identity
    assert [type(drop) for drop in drops[1:]] == [StochasticDepth] * 4
    assert [drop.p for drop in drops[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert {drop.mode for drop in drops[1:]} == {"row"}


def test_stochastic_depth_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(ModuleNotFoundError, match=r"drop_path=0\.1.* needs torchvision"):
        BiFormer(**{**TINY, "depth": (1, 1, 1, 2)}, drop_path_rate=0.4)


def test_a_single_block_is_never_skipped():
    model = BiFormer(depth=(1,), embed_dim=(16,), topks=(1,), head_dim=8, drop_path_rate=0.4)
    assert type(model.stages[0][0].drop_path) is nn.Identity


def test_linear_layers_begin_with_small_weights_and_no_bias():
    layers = [layer for layer in BiFormer(**TINY).modules() if isinstance(layer, nn.Linear)]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)  # of some 20,000 normal numbers
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)


def test_classifier_can_be_replaced_or_left_out():
    model = BiFormer(**TINY)
    image = torch.rand(1, 3, *SIZE)
    model.reset_classifier(3)
    assert model(image).shape == (1, 3)
    assert model.get_classifier().bias.eq(0).all()
    model.reset_classifier(0)
    assert model(image).shape == (1, 24)


def test_a_backbone_takes_no_classifier():
    backbone = BiFormerBackbone(**{name: value for name, value in TINY.items() if name != "num_classes"})
    with pytest.raises(ValueError, match="num_classes of a backbone must be 0, got 3"):
        backbone.reset_classifier(3)


@pytest.mark.parametrize("build", [BiFormer, BiFormerBackbone])
def test_checkpointing_computes_every_block_again_and_gives_the_same_gradients(build):
    """In float64, without dropout: both ways compute the same numbers in the same order."""
    arguments = {name: value for name, value in TINY.items() if build is BiFormer or name != "num_classes"}
    model, image, calls, gradients = build(**arguments).double(), torch.rand(2, 3, *SIZE).double(), [], []
    model.stages[1][0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        result = model(image)
        loss = sum(x.square().sum() for x in ([result] if build is BiFormer else result))
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
        assert len(calls) == (3 if enable else 1)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with torch.no_grad():
        model(image)
    with pytest.raises(ValueError, match="enable must be True or False, got 'yes'"):
        model.set_grad_checkpointing("yes")


def test_arguments_of_the_attention_reach_every_routed_stage():
    model = BiFormer(**TINY, kv_downsample_mode="avgpool", kv_downsample_ratio=2, backend="torch")
    attentions = [block.attn for stage in model.stages for block in stage]
    assert [type(a) for a in attentions] == [BiLevelRoutingAttention] * 4 + [DenseAttention]
    assert {(a.kv_downsample_mode, a.backend, a.spec.n_win) for a in attentions[:4]} == {
        ("avgpool", "torch", 2)
    }
    assert [a.spec.num_heads for a in attentions[:4]] == [2, 2, 2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": (1, 1, 1)}, r"one entry for each stage, got \(1, 1, 1\)"),
        ({"depth": (1, 0, 1, 1)}, r"depth\[1\] must be an int of at least 1, got 0"),
        ({"embed_dim": (16, 12, 32, 24)}, r"embed_dim\[1\] must be a multiple of head_dim=8, got 12"),
        ({"embed_dim": (16, 16, 32, 20)}, r"embed_dim\[3\] must be a multiple of the 8 heads, got 20"),
        (
            dict.fromkeys(("depth", "embed_dim", "topks"), ()),
            "depth, embed_dim and topks must have one entry",
        ),
        ({"depth": 2}, "depth, embed_dim and topks must have one entry for each stage, got 2, "),
        ({"topks": (1, 0, 4, -2)}, r"topks\[1\] must be an int of at least 1, or -1 or -2, got 0"),
        ({"topks": (1, 5, 4, -2)}, "topk"),
        ({"head_dim": 0}, "head_dim must be an int of at least 1, got 0"),
        ({"in_chans": 0}, "in_chans must be an int of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an int of at least 0, got -1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be a number from 0 to under 1, got 1.0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must be a number from 0.0625 to under inf, got 0.01"),
        ({"layer_scale_init_value": float("nan")}, "layer_scale_init_value must be .* got nan"),
        ({"side_dwconv": 2}, "side_dwconv must be 0 or an odd kernel size, got 2"),
        (
            {"topks": (-1, -1, -1, -1), "soft_routing": True, "side_dwconv": 3},
            r"no stage of .* is routed.*\['n_win', 'head_dim', 'side_dwconv', 'soft_routing'\]",
        ),
        ({"kv_per_win": 2}, "kv_per_win=2 has no effect without kv_downsample_mode: ada_avgpool or ada_max"),
        (
            {"kv_downsample_mode": "avgpool", "kv_downsample_kernel": 3},
            "kv_downsample_kernel=3 has no effect",
        ),
        ({"topks": (-1, -1, -2, -2), "head_dim": 32}, r"no stage of .* is routed.*: \['n_win'\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BiFormer(**{**TINY, **change})


def test_a_backbone_without_a_routed_stage_has_no_padding_to_switch_off():
    dense = {"topks": (-2, -2, -2, -2), "depth": (1, 1, 1, 1)}
    assert len(BiFormerBackbone(**dense)(torch.rand(1, 3, *SIZE))) == 4
    with pytest.raises(ValueError, match=r"no stage of .* is routed.*: \['auto_pad'\]"):
        BiFormerBackbone(**dense, auto_pad=False)

    class Registered(BiFormerBackbone):
        """As docs/migration.md has it for mmdetection."""

        def __init__(self, n_win=16, **arguments):
            super().__init__(n_win=n_win, **arguments)

    assert Registered(**dense).stages[0][0].attn.lepe


@pytest.mark.parametrize("name", ["pretrained", "dim", "topk", "num_heads"])
def test_an_argument_that_the_attention_does_not_take_here_is_refused(name):
    with pytest.raises(TypeError, match=f"^BiFormer has no argument '{name}'; allowed are depth, .*, qk_dim"):
        BiFormer(**TINY, **{name: 1})


def test_a_backbone_refuses_the_number_of_classes_that_the_authors_configs_give_it():
    with pytest.raises(TypeError, match="no argument num_classes, got 80; leave it out"):
        BiFormerBackbone(num_classes=80)
