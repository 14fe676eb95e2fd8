"""The modules under `torch.compile`: one graph, changing sizes, and the gradients of an eager step."""

import shutil

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from interpreter import INTERPRETED
from modules import run
from problems import relative_error, worst
from torch import nn

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.modules.permuted import PermutedBiLevelRoutingAttention
from bra_triton.modules.tokens import TokenBiLevelRoutingAttention

DIFF = {"diff_routing": True}
MODES = {
    "LePE": {},
    "soft": {"soft_routing": True, "side_dwconv": 0},
    "hard, param_routing": DIFF | {"param_routing": True},
    "avgpool": {"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2},
    "soft, conv": DIFF | {"soft_routing": True, "kv_downsample_mode": "conv", "kv_downsample_ratio": 2},
    "whole": {"topk": 4, "qk_dim": 4},
}
# The first size needs padding, the second does not: one graph must serve both, and the sizes that follow. No
# region has a single cell, because a compiler makes a size of 1 a constant. No side equals another size,
# because a compiler uses one symbol for equal sizes. All regions have more than 16 tokens, because the Triton
# backend saves other arrays for smaller regions.
SIZES = ((11, 9), (10, 12), (13, 9), (12, 10))


class _Several(nn.Module):
    """Several modes in one graph, because compiling takes long, whether for one mode or for ten."""

    def __init__(self, backend, names):
        super().__init__()
        numbers = {"num_heads": 1, "n_win": 2, "backend": backend}
        self.modes = nn.ModuleDict(
            {
                name: BiLevelRoutingAttention(8, **{"topk": 2, "auto_pad": True, **numbers, **arguments})
                for name, arguments in MODES.items()
                if name in names
            }
        )
        self.nchw = NCHWBiLevelRoutingAttention(8, topk=3, **numbers)

    def forward(self, x):
        out = self.nchw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for mode in self.modes.values():
            out = out + mode(x)
        return out


# Inductor's cache on disk is off, because it may hold graphs with the guards of older sources.
@torch._inductor.config.patch(fx_graph_cache=False)
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler of C++")
@pytest.mark.parametrize(
    ("backend", "names"),
    # Both backends' operators look the same to a compiler, as test_operators checks: one mode is enough for
    # the interpreter.
    [("torch", list(MODES)), ("triton", ["soft, conv"] if INTERPRETED else list(MODES))],
    ids=["torch", "triton"],
)
def test_inductor_compiles_the_training_of_changing_sizes(backend, names, device):
    module = _Several(backend, names).to(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in SIZES[:3] if backend == "triton" and INTERPRETED else SIZES:  # the interpreter is slow
        x, grad_out = torch.randn(2, 2, *size, 8, device=device)
        expected = {k: v.clone() for k, v in run(module, x, grad_out).items()}
        actual = {k.removeprefix("_orig_mod."): v for k, v in run(compiled, x, grad_out).items()}
        # Rounding of float32 gives 1e-6. A gradient that should be 0 is only rounding, hence the factor.
        scale = 1e-3 * expected["x"].norm()
        errors = {
            name: relative_error(actual[name], value.double()) * min(1, value.norm() / scale)
            for name, value in expected.items()
        }
        assert worst(errors.values()) < 1e-5, (size, errors)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0], graphs


@pytest.mark.parametrize(
    ("kind", "backend"),
    # The backends' operators look the same to a compiler, and the interpreter is slow.
    [
        (BiLevelRoutingAttention, "torch"),
        (BiLevelRoutingAttention, "triton"),
        (NCHWBiLevelRoutingAttention, "torch"),
    ],
)
def test_a_seen_size_is_not_compiled_again(kind, backend, device):
    """Without `dynamic`, the default: the first graph has fixed sizes, the second has symbols for all others.

    Of these sizes 5 needs padding, the others do not.
    """
    module = kind(16, 1, 2, topk=2, auto_pad=True, backend=backend).to(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in (4, 5, 4) if backend == "triton" and INTERPRETED else (4, 5, 6, 4):
        x, grad_out = torch.randn(2, 1, size, size, 16, device=device)
        if kind is NCHWBiLevelRoutingAttention:
            x, grad_out = x.permute(0, 3, 1, 2), grad_out.permute(0, 3, 1, 2)
        expected = list(run(module, x, grad_out).values())
        actual = list(run(compiled, x, grad_out).values())
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(actual, expected, strict=True))
    assert counter.frame_count <= 2


def test_tokens_of_square_maps_of_changing_size():
    """The side is the root of the number of tokens, which becomes a symbol; 9 x 9 needs padding."""
    module = TokenBiLevelRoutingAttention(16, 1, 2, topk=2, auto_pad=True, backend="torch")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for side in (8, 9, 12, 8):
        x, grad_out = torch.randn(2, 2, side * side, 16)
        expected = list(run(module, x, grad_out).values())
        actual = list(run(compiled, x, grad_out).values())
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(actual, expected, strict=True))
    assert counter.frame_count == 2


@torch._inductor.config.patch(fx_graph_cache=False)
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler of C++")
def test_beside_a_convolution_maps_are_kept_as_they_are(device):
    """In a graph with a convolution Inductor takes tensors of four axes for images: it would keep maps for
    the backward as copies in the layout of images.

    Without LePE the backward also reads the attention's output, which must not be copied either. Maps are
    6 x 8.
    """
    layers = [nn.Conv2d(3, 16, 3, 2, 1)]
    for lepe in (3, 0):
        numbers = {"num_heads": 1, "n_win": 2, "topk": 2, "side_dwconv": lepe, "backend": "torch"}
        layers += [PermutedBiLevelRoutingAttention(16, **numbers), NCHWBiLevelRoutingAttention(16, **numbers)]
    model = nn.Sequential(*layers, nn.Conv2d(16, 4, 3, 1, 1)).to(device)
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True)(torch.randn(2, 3, 12, 16, device=device))
    maps = [x for x in out.grad_fn.saved_tensors if (6, 8) in (x.shape[1:3], x.shape[2:4])]
    projections = [x for x in maps if x.shape[-1] == 48]
    assert len(projections) == 4
    for x in maps:
        channels = 1 if x.shape[2:] == (6, 8) and x.shape[1] == 16 else -1  # axis 1 in an image
        assert x.stride(channels) == 1, (x.shape, x.stride())


@torch._inductor.config.patch(fx_graph_cache=False, layout_optimization=False)
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler of C++")
def test_changing_sizes_between_convolutions_with_the_setting_that_the_guide_names():
    """On the CPU PyTorch 2.14 fails without `layout_optimization=False`, even with a linear layer in place of
    the attention."""
    attention = PermutedBiLevelRoutingAttention(16, 1, n_win=2, topk=2, backend="torch")
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), attention, nn.Conv2d(16, 4, 3, 1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for size in ((12, 12), (16, 20)):
        x, grad_out = torch.randn(2, 3, *size), torch.randn(2, 4, size[0] // 2, size[1] // 2)
        expected, actual = (run(each, x, grad_out).values() for each in (model, compiled))
        assert all(torch.allclose(a, e, atol=1e-4) for a, e in zip(actual, expected, strict=True))


def test_operators_called_where_dynamo_watches_but_does_not_compile():
    """After a graph break in a `try` Dynamo runs the frame uncompiled, but watches what operators call."""
    module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend="torch")

    def attend(x):
        x = x * 2
        torch._dynamo.graph_break()
        try:
            x = module(x)
            torch._dynamo.graph_break()
        finally:
            pass
        return x.sin()

    x = torch.randn(2, 8, 8, 32, requires_grad=True)
    expected, actual = attend(x), torch.compile(attend, backend="eager")(x)
    assert relative_error(actual, expected.double()) < 1e-6
    assert (
        relative_error(*(torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected.double()))) < 1e-6
    )


def test_a_number_that_is_set_and_a_hook_are_noticed():
    module = BiLevelRoutingAttention(12, 2, 2, topk=2, auto_pad=True, backend="torch")
    compiled, x = torch.compile(module, backend="eager", fullgraph=True), torch.randn(1, 7, 8, 12)

    def hook():
        module.lepe.register_forward_hook(lambda layer, inputs, out: 2 * out)

    for change in (lambda: None, lambda: setattr(module, "topk", 4), hook):
        change()
        assert relative_error(compiled(x), module(x).double()) < 1e-5


def test_a_compiled_graph_holds_the_operator():
    """PyTorch 2.8 takes `torch.compiler.is_exporting()` for True in it; then the export would be compiled."""
    module, called = BiLevelRoutingAttention(12, 2, 2, topk=2, auto_pad=True, backend="torch"), []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(torch.randn(1, 7, 8, 12))
    assert "bra_triton.attend" in called
