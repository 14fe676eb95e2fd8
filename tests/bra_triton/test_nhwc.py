"""The NHWC drop-in: its arguments, keys and return values, its padding, and what it refuses."""

import copy
import inspect

import pytest
import torch
from modules import reference_of, run
from problems import CASES_BY_NAME, random_map, relative_error, worst
from torch import nn
from torch.nn.utils import parametrize

import bra_triton
from bra_triton import BiLevelRoutingAttention, functional, reference
from bra_triton.call import Call

BACKENDS = ("torch", "triton")
FLOAT32_TOLERANCE = 1e-5  # as in test_attention


class TestDropIn:
    """Arguments, keys and return values of the original."""

    ORIGINAL_ARGUMENTS = (
        "dim num_heads n_win qk_dim qk_scale kv_per_win kv_downsample_ratio kv_downsample_kernel "
        "kv_downsample_mode topk param_attention param_routing diff_routing soft_routing side_dwconv auto_pad"
    ).split()

    def test_positional_order_and_defaults(self):
        parameters = list(inspect.signature(BiLevelRoutingAttention).parameters.values())
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == self.ORIGINAL_ARGUMENTS
        assert [p.default for p in positional[1:]] == [
            *(8, 7, None, None, 4, 4, None, "identity", 4, "qkvo", False, False, False, 3, False)
        ]
        assert {p.name for p in parameters} - {p.name for p in positional} == {"backend"}

    def test_state_dict_keys_and_shapes(self):
        state = BiLevelRoutingAttention(64, 2, qk_dim=32, side_dwconv=5).state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "lepe.weight": (64, 1, 5, 5),
            "lepe.bias": (64,),
            "qkv.qkv.weight": (128, 64),
            "qkv.qkv.bias": (128,),
            "wo.weight": (64, 64),
            "wo.bias": (64,),
        }

    def test_state_dict_with_a_parametrised_router(self):
        module = BiLevelRoutingAttention(32, 1, param_routing=True, diff_routing=True)
        assert {"router.emb.weight", "router.emb.bias"} < set(module.state_dict())

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_attention_mask_in_the_original_shapes(self, backend, device):
        module = BiLevelRoutingAttention(32, 2, 4, topk=3, auto_pad=True, backend=backend).to(device)
        x = torch.randn(2, 10, 8, 32, device=device)
        out, r_weight, r_idx, attn_weight = module(x, ret_attn_mask=True)
        assert r_weight.shape == r_idx.shape == (2, 16, 3)
        assert r_idx.dtype == torch.int64
        assert attn_weight.shape == (32, 2, 6, 18)
        assert relative_error(module(x), out.double()) < FLOAT32_TOLERANCE

    @pytest.mark.parametrize("frozen", ["qkv", "lepe", "lepe.bias", "wo"])
    def test_frozen_parameters_leave_the_other_gradients_as_they_are(self, frozen):
        module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend="torch")
        partly = copy.deepcopy(module)
        for name, parameter in partly.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        x = torch.randn(1, 8, 8, 32)
        for each in (module, partly):
            each(x).square().sum().backward()
        for (name, parameter), expected in zip(partly.named_parameters(), module.parameters(), strict=True):
            assert (
                parameter.grad is None
                if name.startswith(frozen)
                else torch.equal(parameter.grad, expected.grad)
            )

    def test_without_a_lepe_bias(self):
        spec = CASES_BY_NAME["rectangular"].spec
        qkv, weight = random_map(CASES_BY_NAME["rectangular"], torch.device("cpu")), torch.randn(64, 1, 3, 3)
        inputs = [qkv.requires_grad_(), weight.double().requires_grad_()]
        results = [
            torch.autograd.grad(
                functional.attend(Call(inputs[0], spec, inputs[1]), backend).square().sum(), inputs
            )
            for backend in ("torch", "reference")
        ]
        assert all(relative_error(a, e) < 1e-12 for a, e in zip(*results, strict=True))

    def test_is_exported(self):
        assert "BiLevelRoutingAttention" in bra_triton.__all__


class TestErrors:
    """Bad input is refused before any computation, by an error that names the argument."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dim": 30}, r"dim must be a multiple of num_heads=8, got 30"),
            ({"dim": 64, "qk_dim": 36}, r"qk_dim must be a multiple of num_heads=8, got 36"),
            ({"dim": 0}, r"dim must be an int of at least 1, got 0"),
            ({"dim": 64.0}, r"dim must be an int of at least 1, got 64.0"),
            ({"dim": 64, "topk": 50}, r"topk must be at most the number of regions, 49 for n_win=7, got 50"),
            ({"dim": 64, "topk": 0}, r"topk must be an int of at least 1, got 0"),
            ({"dim": 64, "n_win": -1}, r"n_win must be an int of at least 1, got -1"),
            ({"dim": 64, "qk_scale": 0.0}, r"qk_scale must be a number from .* other than 0, got 0.0"),
            ({"dim": 64, "param_attention": "none"}, r"param_attention must be one of .*, got 'none'"),
            ({"dim": 64, "param_routing": True}, r"param_routing=True needs diff_routing=True"),
            ({"dim": 64, "side_dwconv": 4}, r"side_dwconv must be 0 or an odd kernel size, got 4"),
            ({"dim": 64, "side_dwconv": "5"}, r"side_dwconv must be 0 or an odd kernel size, got '5'"),
            ({"dim": 64, "kv_downsample_mode": "mean"}, r"kv_downsample_mode must be one of .*, got 'mean'"),
            ({"dim": 64, "backend": "cuda"}, r"backend must be one of .*'auto'.*, got 'cuda'"),
        ],
    )
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            BiLevelRoutingAttention(**arguments)

    def test_indivisible_map_without_padding(self):
        module = BiLevelRoutingAttention(32, 1, 7, backend="torch")
        with pytest.raises(ValueError, match=r"multiples of n_win=7, got 20 x 21; .* auto_pad=True"):
            module(torch.randn(1, 20, 21, 32))

    @pytest.mark.parametrize("shape", [(1, 32, 8, 8), (8, 8, 32)])
    def test_map_of_another_layout(self, shape):
        module = BiLevelRoutingAttention(32, 1, 2, topk=2, backend="torch")
        with pytest.raises(ValueError, match=r"x must be \(N, H, W, dim\) with dim=32"):
            module(torch.randn(shape))

    def test_map_that_needs_padding_with_the_attention_matrix(self):
        """The reference computes it, and pads what it gets."""
        module = BiLevelRoutingAttention(32, 1, 2, topk=2)
        with pytest.raises(ValueError, match="must be multiples of n_win=2, got 4 x 5"):
            module(torch.randn(1, 4, 5, 32), ret_attn_mask=True)


class _Failing(nn.Module):
    """A layer without parameters that fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("broken"), r"^qkv fails on a map \(1, 4, 4, 16\): broken$"),
        (torch.OutOfMemoryError("full"), "^full$"),  # callers look for it by its class
    ],
)
def test_an_error_of_a_layer_names_the_layer_unless_its_class_tells_what_it_is(error, message):
    module = BiLevelRoutingAttention(16, 1, 2, topk=2, backend="torch")
    module.qkv = _Failing(error)
    with pytest.raises(type(error), match=message):
        module(torch.randn(1, 4, 4, 16))


class _Adapter(nn.Module):
    """Adds a shift to a projection, as adapters do: a zero token is not projected to the layer's bias."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.shift = layer, nn.Parameter(torch.randn(layer.out_features))

    def forward(self, x):
        return self.layer(x) + self.shift


class _Doubled(nn.Module):
    def forward(self, bias):
        return 2 * bias


def _replace_inner(module):
    module.qkv.qkv = _Adapter(module.qkv.qkv)


def _replace_outer(module):
    module.qkv = _Adapter(module.qkv.qkv)


def _without_bias(module):
    module.qkv.qkv.bias = None


PROJECTIONS = {
    "plain": lambda module: None,
    "hooked": lambda module: module.qkv.qkv.register_forward_hook(lambda m, inputs, out: out + 1.5),
    "hooked outside": lambda module: module.qkv.register_forward_hook(lambda m, inputs, out: out + 1.5),
    "hooked before": lambda module: module.qkv.register_forward_pre_hook(lambda m, inputs: (inputs[0] + 1,)),
    "adapter inside": _replace_inner,
    "adapter": _replace_outer,
    "without bias": _without_bias,
    "parametrized": lambda module: parametrize.register_parametrization(module.qkv.qkv, "bias", _Doubled()),
}


class TestPadding:
    """Padding tokens hold the projection of a zero token, also if the projection is hooked or replaced."""

    @pytest.mark.parametrize("projection", PROJECTIONS)
    def test_is_what_the_projection_makes_of_zero(self, projection):
        module = BiLevelRoutingAttention(16, 2, 2, topk=2, auto_pad=True, backend="torch")
        PROJECTIONS[projection](module)
        module.double()
        x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
        # As the reference does: pad the map before the projection, and crop the output.
        by_hand = module(nn.functional.pad(x, (0, 0, 0, 1, 0, 1)))[:, :5, :7]
        assert relative_error(module(x), by_hand) < 1e-12
        actual, expected = (run(each, x, x) for each in (module, reference_of(module)))
        assert worst(relative_error(actual[name], x) for name, x in expected.items()) < 1e-12

    @pytest.mark.parametrize("projection", PROJECTIONS)
    def test_is_no_part_of_the_map_of_a_call(self, projection):
        """`forward` pads the map if the projection is not plain; tools that inspect a call need the map."""
        module = BiLevelRoutingAttention(16, 2, 2, topk=2, auto_pad=True, backend="torch")
        PROJECTIONS[projection](module)
        module.double()
        x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
        call = module.call_of(x)
        assert call.qkv.shape == (2, 5, 7, 48)
        assert relative_error(module.wo(reference.attend(call).out), module(x)) < 1e-12

    def test_a_plain_projection_is_not_called_for_it(self, monkeypatch):
        module = BiLevelRoutingAttention(16, 2, 2, topk=2, auto_pad=True, backend="torch")
        calls = []
        linear = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or linear(self, x))
        module(torch.randn(1, 5, 7, 16))
        assert calls == [module.qkv.qkv, module.wo]

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("projection", ["plain", "adapter"])
    def test_under_autocast(self, projection, backend, device):
        """Under autocast the bias is float32, and the projection's output is bfloat16."""
        module = BiLevelRoutingAttention(16, 2, 2, topk=4, auto_pad=True, backend=backend)
        PROJECTIONS[projection](module)
        module.to(device)
        x, grad_out = torch.randn(2, 1, 3, 5, 16, device=device)
        expected = run(reference_of(module), x.double(), grad_out.double())
        with torch.autocast(device.type, torch.bfloat16):
            actual = run(module, x, grad_out)
        assert actual["out"].dtype == torch.bfloat16
        assert all(actual[name].dtype == torch.float32 for name in expected if name != "out")
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        # bfloat16 keeps 8 bits; results are rounded a few times.
        assert worst(errors.values()) < 3e-2, errors


def test_backend_can_be_changed():
    module = BiLevelRoutingAttention(16, 2, 2, topk=2, backend="torch")
    x = torch.randn(1, 4, 6, 16)
    expected = module(x)
    module.backend = "reference"
    # Only the reference has second derivatives.
    (first,) = torch.autograd.grad(module(y := x.requires_grad_()).square().sum(), y, create_graph=True)
    first.sum().backward()
    assert relative_error(module(x), expected.double()) < FLOAT32_TOLERANCE
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"):
        module.backend = "cuda"
    assert module.backend == "reference"
