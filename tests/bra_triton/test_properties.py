"""The drop-in and the functional API against the reference; Hypothesis draws arguments, maps and strides."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import reference_of, region_means
from problems import relative_error
from properties import (
    DTYPES,
    Layout,
    WithValues,
    assume_equal_routes,
    judge,
    layouts,
    needs_interpreter,
    profile,
    relative_errors,
    run,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from bra_triton import BiLevelRoutingAttention, functional, reference
from bra_triton.backend.select import BACKENDS
from bra_triton.call import Call
from bra_triton.kernels.grid import RegionGrid
from bra_triton.modules import downsampling

# In every list of choices the first is the most demanding. Hypothesis makes its first example of first
# choices, and draws few others for the interpreter, where an example takes a second or two.
HEAD_DIMS = (12, *range(1, 21))
ROUTINGS = (
    {"soft_routing": True, "diff_routing": True, "param_routing": True},
    {"diff_routing": True, "param_routing": True},
    {"soft_routing": True, "diff_routing": True},
    {"soft_routing": True},
    {"diff_routing": True},
    {},
)


@dataclass(frozen=True)
class Drawn:
    """A module's arguments; size, dtype and memory layout of its map and of the output's gradient."""

    arguments: dict
    batch: int
    size: tuple[int, int]
    dtype: torch.dtype
    layout: Layout
    grad_layout: Layout
    training: bool
    seed: int

    @property
    def grid(self) -> RegionGrid:
        return RegionGrid.of_windows(*self.size, self.arguments["n_win"])

    def map(self, channels: int) -> torch.Tensor:
        """Random tokens in float64; regions have different means, so that all precisions route alike."""
        grid = self.grid
        x = torch.randn(self.batch, grid.rows, grid.columns, channels)
        x = x.repeat_interleave(grid.region_height, 1).repeat_interleave(grid.region_width, 2)
        x = x[:, : grid.height, : grid.width]
        return (x + torch.randn(x.shape)).to(self.dtype).double()


@st.composite
def drawn(draw, backend, modes=downsampling.MODES[::-1]):
    """Any valid combination of the arguments, at sizes small enough for the interpreter."""

    def choose(*choices):
        return draw(st.sampled_from(choices))

    few = (2, 1) if backend == "triton" else (2, 1, 3)
    n_win, num_heads, auto_pad = choose(*few), choose(*few), choose(True, False)
    sides = (2 * n_win + 1, *range(1, 4 * n_win)) if auto_pad else [n_win * side for side in (3, 2, 1, 4)]
    size = choose(*sides), choose(*sides)
    dim, qk_dim = (num_heads * choose(*HEAD_DIMS) for _ in range(2))
    arguments = {
        "dim": dim,
        "num_heads": num_heads,
        "n_win": n_win,
        "qk_dim": choose(qk_dim, None),
        # With larger scores the rounding would exceed gradients whose terms nearly cancel.
        "qk_scale": choose(None, 0.25 * qk_dim**-0.5, 1.5 * qk_dim**-0.5),
        "topk": choose(*range((n_win**2 + 1) // 2, n_win**2 + 1), *range(1, (n_win**2 + 1) // 2)),
        "param_attention": choose("qkvo", "qkv"),
        "side_dwconv": choose(3, 5, 0),
        "auto_pad": auto_pad,
        **choose(*ROUTINGS),
        **draw(downsamplings(choose(*modes), [-(-side // n_win) for side in size])),
    }
    return Drawn(
        arguments,
        batch=choose(2, 1) if backend == "torch" or num_heads == 1 else 1,
        size=size,
        dtype=choose(*DTYPES[backend]),
        layout=draw(layouts(4, expandable=(0,))),
        grad_layout=draw(layouts(4, expandable=(0, 1, 2, 3))),
        training=choose(True, False),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def downsamplings(draw, mode, sides):
    """Arguments of a `kv_downsample_mode` that are valid for regions of these sides."""
    arguments, shortest = {"kv_downsample_mode": mode}, min(sides)
    if mode in ("ada_avgpool", "ada_maxpool"):
        arguments["kv_per_win"] = draw(st.sampled_from((2, 1, 3, 4)))
    elif mode in ("avgpool", "maxpool"):
        arguments["kv_downsample_ratio"] = draw(st.sampled_from((min(2, shortest), *range(1, shortest + 1))))
    elif mode == "fracpool":
        arguments["kv_downsample_ratio"] = ratio = draw(st.sampled_from((1.5, 1.25, 2, 3, 1)))
        counts = [(side, max(1, math.floor(side / ratio))) for side in sides]
        smallest = max(-(-side // count) for side, count in counts)
        largest = min(side - count + 1 for side, count in counts)
        kernels = st.integers(smallest, largest) if smallest <= largest else st.nothing()
        arguments["kv_downsample_kernel"] = draw(st.none() | kernels)
    elif mode == "conv":
        arguments["kv_downsample_ratio"] = ratio = draw(st.integers(1, 3))
        default = st.none() if ratio <= shortest else st.nothing()
        arguments["kv_downsample_kernel"] = draw(default | st.integers(1, min(3, shortest)))
    return arguments


@pytest.mark.parametrize("mode", downsampling.MODES)
def test_the_drop_in_is_the_reference_on_the_torch_backend(mode):
    """Output, and the gradients of input and all parameters."""

    @profile(10)
    @given(drawn("torch", [mode]))
    def check(drawn):
        judge(_module_errors(drawn, "torch"), drawn)

    check()


@needs_interpreter
@profile(2)
@given(drawn("triton"))
def test_the_drop_in_is_the_reference_on_the_interpreter(drawn):
    judge(_module_errors(drawn, "triton"), drawn)


def _module_errors(drawn, backend):
    """Relative errors by name, of the module in its dtype against the reference in float64."""
    torch.manual_seed(drawn.seed)
    module = BiLevelRoutingAttention(**drawn.arguments, backend=backend).to(drawn.dtype)
    module.train(drawn.training)
    oracle = reference_of(module)
    x = drawn.layout.of(drawn.map(module.spec.dim))
    grad_out = drawn.grad_layout.of(torch.randn(x.shape).to(drawn.dtype).double())

    projections = []

    def seen(layer, inputs, output):
        if layer is module.qkv:
            projections.append(output.detach())

    # A hook on the projection itself would make the module pad the map, as the oracle does below.
    with register_module_forward_hook(seen):
        actual = run(
            module,
            drawn.layout.of(x.to(drawn.dtype)),
            drawn.grad_layout.of(grad_out.to(drawn.dtype)),
            drawn.seed,
        )
    projected = projections[0]  # there are more if the call is checkpointed
    padding = module.qkv.qkv.bias.detach() if drawn.grid.is_padded else None
    errors = {"projection": relative_error(projected, oracle.qkv(x))}

    # Use the rounded projection from here on: the exact one may have other routes and other maxima.
    values, padding_values = projected.double(), None if padding is None else padding.double()
    linear = isinstance(module.router.emb, nn.Linear)
    router = (module.router.emb.weight, module.router.emb.bias) if linear else (None, None)
    r_idx = _route(Call(projected, module.spec, None, None, padding, *router), backend)
    emb = oracle.router.emb
    router = (emb.weight, emb.bias) if linear else (None, None)
    _check_routes(r_idx, Call(values, module.spec, None, None, padding_values, *router))
    oracle.qkv = WithValues(oracle.qkv, values, padding_values)
    expected = run(oracle, x, grad_out, drawn.seed)
    expected = {name.replace("qkv.exact.", "qkv."): value for name, value in expected.items()}
    return errors | relative_errors(actual, expected, ("qkv.qkv.weight", "qkv.qkv.bias"))


def _route(call, backend):
    return BACKENDS[backend].route(call)[1]


def _check_routes(r_idx, call):
    """Fails if `r_idx` is not the float64 reference's choice; discards the example if only by rounding."""
    assume_equal_routes(r_idx, reference.route(call)[1], *region_means(call))


@dataclass(frozen=True)
class DrawnCall:
    """A call of the functional API, and the memory layout of each of its tensors."""

    module: Drawn
    layouts: dict[str, Layout]

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype


@st.composite
def drawn_calls(draw, backend):
    module = draw(drawn(backend))
    of_any = {
        "qkv": layouts(4, expandable=(0,)),
        "lepe_weight": layouts(4, expandable=(0, 1, 2, 3)),
        "lepe_bias": layouts(1, expandable=(0,)),
        "padding": layouts(1, expandable=(0,)),
        "router_weight": layouts(2, expandable=(0, 1)),
        "router_bias": layouts(1, expandable=(0,)),
    }
    return DrawnCall(module, {name: draw(layout) for name, layout in of_any.items()})


@pytest.mark.parametrize(
    ("backend", "examples"), [("torch", 25), pytest.param("triton", 2, marks=needs_interpreter)]
)
def test_the_functional_api_takes_tensors_of_any_strides(backend, examples):
    """Output, and the gradients of all tensors that it takes."""

    @profile(examples)
    @given(drawn_calls(backend))
    def check(drawn):
        judge(_call_errors(drawn, backend), drawn)

    check()


def _call_errors(drawn, backend):
    torch.manual_seed(drawn.module.seed)
    module = BiLevelRoutingAttention(**drawn.module.arguments).to(drawn.dtype)
    spec, grid = module.spec, drawn.module.grid
    tensors = {"qkv": drawn.module.map(spec.packed_dim)}
    if grid.is_padded:
        tensors["padding"] = torch.randn(spec.packed_dim)
    if module.lepe is not None:
        tensors |= {"lepe_weight": module.lepe.weight, "lepe_bias": module.lepe.bias}
    if isinstance(module.router.emb, nn.Linear):
        tensors |= {"router_weight": module.router.emb.weight, "router_bias": module.router.emb.bias}
    tensors = {name: x.detach().to(drawn.dtype) for name, x in tensors.items()}
    grad_out = torch.randn(drawn.module.batch, *drawn.module.size, spec.dim).to(drawn.dtype)
    down = None if isinstance(module.kv_down, nn.Identity) else module.kv_down.eval()

    def run(backend, dtype):
        leaves = {name: drawn.layouts[name].of(x.to(dtype)).requires_grad_() for name, x in tensors.items()}
        numbers = {"n_win": spec.n_win, "topk": spec.topk, "qk_dim": spec.qk_dim, "scale": spec.scale}
        routing = {name: x for name, x in leaves.items() if not name.startswith(("qkv", "lepe"))}
        routing |= {"diff_routing": spec.diff_routing}
        out = functional.bi_level_routing_attention(
            num_heads=spec.num_heads,
            soft_routing=spec.soft_routing,
            kv_downsampling=None if down is None else down.to(dtype),
            backend=backend,
            **(numbers | routing | leaves),
        )
        grads = torch.autograd.grad(
            out, list(leaves.values()), drawn.module.grad_layout.of(grad_out.to(dtype)), allow_unused=True
        )
        _, r_idx = functional.region_routing(leaves["qkv"], **numbers, **routing, backend=backend)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}, r_idx, leaves

    (expected, _, leaves), (actual, r_idx, _) = run("reference", torch.float64), run(backend, drawn.dtype)
    routed = {name: x for name, x in leaves.items() if not name.startswith("lepe")}
    _check_routes(r_idx, Call(**routed, spec=spec))
    # The yardstick includes `padding`: on a map of few tokens all chosen keys may be padding.
    return relative_errors(actual, expected, [name for name in ("qkv", "padding") if name in expected])


def _every_other(x):
    """The values of `x` with a stride of 2 along the last dimension, and NaN in between."""
    return torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("strided", ["qkv", "padding", "lepe_bias"])
def test_strides_do_not_change_the_result(strided, backend):
    """Kernels must read by the tensors' strides; with wrong strides they may read past a tensor's end."""
    qkv = torch.randn(1, 4, 1, 16)
    tensors = {
        "qkv": qkv,
        "padding": torch.randn(16),
        "lepe_weight": torch.randn(8, 1, 3, 3),
        "lepe_bias": torch.randn(8),
    }
    if strided == "qkv":  # PyTorch calls a transposed row contiguous: it ignores the stride of an axis of 1
        changed = qkv.view(1, 1, 4, 16).transpose(1, 2)
        assert changed.is_contiguous()
        assert changed.stride() == (64, 16, 64, 1)
    else:
        changed = _every_other(tensors[strided])
    results = []
    for each in (tensors, tensors | {strided: changed}):
        leaves = {name: x.detach().requires_grad_() for name, x in each.items()}
        out = functional.bi_level_routing_attention(
            **leaves, num_heads=1, n_win=2, topk=2, qk_dim=4, backend=backend
        )
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))
