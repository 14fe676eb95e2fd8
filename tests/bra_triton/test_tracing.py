"""`torch.fx` keeps the attention as a leaf; `torch.jit.script` is refused; the module for tokens."""

import pytest
import torch
from torch import nn

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.modules.permuted import PermutedBiLevelRoutingAttention
from bra_triton.modules.tokens import TokenBiLevelRoutingAttention

SIZE = {"dim": 12, "num_heads": 2, "n_win": 2, "topk": 3, "backend": "torch"}
MAPS = {
    BiLevelRoutingAttention: (1, 4, 6, 12),
    NCHWBiLevelRoutingAttention: (1, 12, 4, 6),
    PermutedBiLevelRoutingAttention: (1, 12, 4, 6),
    TokenBiLevelRoutingAttention: (1, 16, 12),
}
every_kind = pytest.mark.parametrize("kind", MAPS)


class Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn, self.scale = attn, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.scale * self.attn(x)


@every_kind
def test_symbolic_trace_keeps_it_as_a_leaf(kind):
    model, x = nn.Sequential(Block(kind(**SIZE)), nn.ReLU()), torch.randn(MAPS[kind])
    traced = torch.fx.symbolic_trace(model)
    assert "0.attn" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert torch.equal(traced(x), model(x))


class WithArguments(nn.Module):
    def __init__(self, attn, arguments):
        super().__init__()
        self.attn, self.arguments = attn, arguments

    def forward(self, x):
        return self.attn(x, **self.arguments)


@every_kind
def test_a_trace_passes_the_other_arguments_on(kind):
    model, x = WithArguments(kind(**SIZE), {"ret_attn_mask": True}), torch.randn(MAPS[kind])
    traced = torch.fx.symbolic_trace(model)(x)
    assert all(torch.equal(a, b) for a, b in zip(traced, model(x), strict=True))


@pytest.mark.parametrize("arguments", [{"attn_mask": torch.ones(16, 16)}, {"is_causal": True}], ids=[*"mc"])
def test_a_traced_mask_is_refused_as_any_other(arguments):
    traced = torch.fx.symbolic_trace(WithArguments(TokenBiLevelRoutingAttention(**SIZE), arguments))
    with pytest.raises(ValueError, match="attn_mask must be None and is_causal False"):
        traced(torch.randn(1, 16, 12))


@every_kind
def test_symbolic_trace_keeps_the_arguments_of_the_leaf(kind):
    class Mapped(Block):
        def forward(self, x):
            return self.attn(x, ret_attn_mask=True)[-1]

    model, x = Mapped(kind(**SIZE)), torch.randn(MAPS[kind])
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@every_kind
def test_features_can_be_taken_from_it(kind):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = nn.Sequential(Block(kind(**SIZE)), nn.ReLU()), torch.randn(MAPS[kind])
    features = extraction.create_feature_extractor(model, ["0.attn", "0"])(x)
    assert torch.equal(features["0.attn"], model[0].attn(x))
    assert torch.equal(features["0"], model[0](x))


@every_kind
def test_the_attention_itself_cannot_be_traced(kind):
    with pytest.raises(TypeError, match=r"symbolic_trace\(nn.Sequential\(attention\)\)"):
        torch.fx.symbolic_trace(kind(**SIZE))


@every_kind
@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_torchscripts_compiler_is_refused_with_words(kind):
    for model in (kind(**SIZE), nn.Sequential(kind(**SIZE))):
        with pytest.raises(TypeError, match=r"torch.jit.script cannot compile .* use torch.jit.trace"):
            torch.jit.script(model)


class TestTokens:
    def test_are_those_of_the_map_row_by_row(self):
        x = torch.randn(2, 4, 6, 12)
        for size in ((4, 6), None):
            x = x if size else torch.randn(2, 4, 4, 12)
            tokens = TokenBiLevelRoutingAttention(**SIZE, size=size)
            nhwc = BiLevelRoutingAttention(**SIZE)
            nhwc.load_state_dict(tokens.state_dict())
            assert torch.equal(tokens(x.flatten(1, 2)), nhwc(x).flatten(1, 2))
            for actual, expected in zip(
                tokens(x.flatten(1, 2), ret_attn_mask=True)[1:], nhwc(x, True)[1:], strict=True
            ):
                assert torch.equal(actual, expected)

    def test_size_may_be_set(self):
        attention = TokenBiLevelRoutingAttention(**SIZE)
        attention.size = [2, 6]
        assert attention(torch.randn(1, 12, 12)).shape == (1, 12, 12)
        with pytest.raises(ValueError, match=r"size must be two ints of at least 1, got \(2, 0\)"):
            attention.size = (2, 0)

    @pytest.mark.parametrize("others", [{"attn_mask": torch.ones(16, 16)}, {"is_causal": True}])
    def test_a_mask_is_refused_and_none_is_taken(self, others):
        """timm's blocks pass `attn_mask` on to the attention."""
        attention, x = TokenBiLevelRoutingAttention(**SIZE), torch.randn(1, 16, 12)
        attention(x, attn_mask=None, is_causal=False)
        with pytest.raises(ValueError, match="attn_mask must be None and is_causal False"):
            attention(x, **others)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            (
                (1, 17, 12),
                r"x must have the 4 x 4 tokens .*, got 17; .* set `size` of the module .* class token",
            ),
            ((1, 4, 4, 12), r"x must be \(N, H \* W, dim\), got shape \(1, 4, 4, 12\)"),
            ((1, 16, 8), r"x must be .* with dim=12"),
        ],
    )
    def test_what_is_no_map(self, shape, message):
        with pytest.raises(ValueError, match=message):
            TokenBiLevelRoutingAttention(**SIZE)(torch.randn(shape))
