"""Attention to given regions and `nchwBRA` against the reference, on drawn maps, graphs and strides."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import nchw_call, reference_of, region_means
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

from bra_triton import NCHWBiLevelRoutingAttention, reference
from bra_triton.backend.select import BACKENDS
from bra_triton.functional import regional_routing_attention
from bra_triton.kernels.grid import RegionGrid

EVERY_DIM = (0, 1, 2, 3)
HEAD_DIMS = st.sampled_from((12, *range(1, 21)))


@dataclass(frozen=True)
class DrawnCall:
    """A call of `regional_routing_attention`, and the memory layout of each of its tensors."""

    batch: int
    num_heads: int
    head_dims: tuple[int, int]
    size: tuple[int, int]
    kv_size: tuple[int, int]
    region_size: tuple[int, int]
    kv_region_size: tuple[int, int] | None
    topk: int
    graph_dtype: torch.dtype
    scale: float
    dtype: torch.dtype
    layouts: dict[str, Layout]
    seed: int

    def tensors(self):
        """Query, key, value, graph and the output's gradient by name, of the drawn dtype, contiguous."""
        torch.manual_seed(self.seed)
        qk, v = (self.num_heads * head_dim for head_dim in self.head_dims)
        shapes = {
            "query": (qk, *self.size),
            "key": (qk, *self.kv_size),
            "value": (v, *self.kv_size),
            "grad_out": (v, *self.size),
        }
        tensors = {name: torch.randn(self.batch, *shape).to(self.dtype) for name, shape in shapes.items()}
        query_regions, kv_regions = (
            RegionGrid.of_region_size(*size, region_size).n_regions
            for size, region_size in (
                (self.size, self.region_size),
                (self.kv_size, self.kv_region_size or self.region_size),
            )
        )
        # Entries are independent, so that a graph may name a region twice: the region then counts twice.
        graph = torch.randint(kv_regions, (self.batch, self.num_heads, query_regions, self.topk))
        return tensors | {"graph": graph.to(self.graph_dtype)}


@st.composite
def drawn_calls(draw, backend):
    # Sizes are small, because the interpreter is slow. It gets few examples, mostly of the first choices, so
    # these are the most demanding.
    sides = st.sampled_from((5, 4, 3, 2, 1) if backend == "triton" else (5, *range(1, 10)))
    region_sides = st.sampled_from((3, 2, 4) if backend == "triton" else (3, 2, 4, 1))
    sizes, region_sizes = st.tuples(sides, sides), st.tuples(region_sides, region_sides)
    size, region_size = draw(sizes), draw(region_sizes)
    kv_size, kv_region_size = draw(sizes | st.just(size)), draw(region_sizes | st.none())
    head_dims = draw(st.tuples(HEAD_DIMS, HEAD_DIMS))
    n_regions = RegionGrid.of_region_size(*kv_size, kv_region_size or region_size).n_regions
    # Not expanded along the channels: all addends of a score would be equal, and scores too large to compare.
    of_maps = layouts(4, expandable=(0, 2, 3))
    of_query = draw(of_maps)
    of_maps |= st.just(of_query)  # maps of a packed projection have the same layout
    return DrawnCall(
        batch=draw(st.sampled_from((2, 1))),
        num_heads=draw(st.sampled_from((2, 1))),
        head_dims=head_dims,
        size=size,
        kv_size=kv_size,
        region_size=region_size,
        kv_region_size=kv_region_size,
        topk=draw(st.sampled_from((min(2, n_regions), *range(1, min(3, n_regions) + 1)))),
        graph_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        scale=draw(st.sampled_from((1.0, 0.25, 2.0))) * head_dims[0] ** -0.5,
        dtype=draw(st.sampled_from(DTYPES[backend])),
        layouts={
            "query": of_query,
            "key": draw(of_maps),
            "value": draw(of_maps),
            "grad_out": draw(layouts(4, expandable=EVERY_DIM)),
            "graph": draw(layouts(4, expandable=(0, 1))),  # expanded over the heads: one graph
        },
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize(
    ("backend", "examples"), [("torch", 40), pytest.param("triton", 3, marks=needs_interpreter)]
)
def test_regional_attention_takes_maps_of_any_strides(backend, examples):
    """Output, and the gradients of all three maps."""

    @profile(examples)
    @given(drawn_calls(backend))
    def check(drawn):
        judge(_call_errors(drawn, backend), drawn)

    check()


def _call_errors(drawn, backend):
    """Relative errors by name, in the drawn dtype and layouts, against the reference in float64."""

    def attend(backend, dtype):
        laid_out = {
            name: drawn.layouts[name].of(x if name == "graph" else x.to(dtype))
            for name, x in drawn.tensors().items()
        }
        maps = {name: laid_out[name].requires_grad_() for name in ("query", "key", "value")}
        out, _ = regional_routing_attention(
            *maps.values(),
            drawn.scale,
            laid_out["graph"],
            drawn.region_size,
            drawn.kv_region_size,
            backend=backend,
        )
        grads = torch.autograd.grad(out, list(maps.values()), laid_out["grad_out"])
        return {"out": out.detach(), **dict(zip(maps, grads, strict=True))}

    return relative_errors(attend(backend, drawn.dtype), attend("reference", torch.float64), ("value",))


@dataclass(frozen=True)
class DrawnModule:
    """A module's arguments; size, dtype and memory layout of its map and of the output's gradient."""

    arguments: dict
    batch: int
    size: tuple[int, int]
    dtype: torch.dtype
    layout: Layout
    grad_layout: Layout
    seed: int


@st.composite
def drawn_modules(draw, backend):
    few = st.sampled_from((2, 1) if backend == "triton" else (2, 1, 3))
    n_win, num_heads, auto_pad = draw(few), draw(few), draw(st.booleans())
    sides = st.sampled_from((2 * n_win + 1, *range(1 if auto_pad else n_win, 4 * n_win + 1)))
    return DrawnModule(
        arguments={
            "dim": num_heads * draw(HEAD_DIMS),
            "num_heads": num_heads,
            "n_win": n_win,
            "qk_scale": draw(st.none() | st.sampled_from((0.125, 0.5, 1.0))),
            "topk": draw(st.sampled_from((n_win, *range(1, n_win**2 + 1)))),
            "side_dwconv": draw(st.sampled_from((3, 5, 0))),
            "auto_pad": auto_pad,
        },
        batch=draw(st.sampled_from((2, 1))) if backend == "torch" or num_heads == 1 else 1,
        size=(draw(sides), draw(sides)),
        dtype=draw(st.sampled_from(DTYPES[backend])),
        layout=draw(layouts(4, expandable=(0,))),
        grad_layout=draw(layouts(4, expandable=EVERY_DIM)),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize(
    ("backend", "examples"), [("torch", 25), pytest.param("triton", 1, marks=needs_interpreter)]
)
def test_the_nchw_drop_in_is_the_reference(backend, examples):
    """Output, and the gradients of input and all parameters."""

    @profile(examples)
    @given(drawn_modules(backend))
    def check(drawn):
        judge(_module_errors(drawn, backend), drawn)

    check()


def _module_errors(drawn, backend):
    """Relative errors by name, of the module in its dtype against the reference in float64."""
    torch.manual_seed(drawn.seed)
    module = NCHWBiLevelRoutingAttention(**drawn.arguments, backend=backend).to(drawn.dtype)
    oracle = reference_of(module)
    x, grad_out = (torch.randn(drawn.batch, module.spec.dim, *drawn.size).to(drawn.dtype) for _ in range(2))
    projections = []
    module.qkv_linear.register_forward_hook(
        lambda _module, _inputs, output: projections.append(output.detach())
    )
    actual = run(module, drawn.layout.of(x), drawn.grad_layout.of(grad_out), drawn.seed)
    x, grad_out = drawn.layout.of(x.double()), drawn.grad_layout.of(grad_out.double())
    projected = projections[0]  # there are more if the call is checkpointed
    errors = {"projection": relative_error(projected, oracle.qkv_linear(x))}

    # Use the rounded projection from here on: the exact one may route to other regions.
    exact = nchw_call(module, projected.double())
    r_idx = BACKENDS[backend].route(nchw_call(module, projected))[1]
    assume_equal_routes(r_idx, reference.route(exact)[1], *region_means(exact))
    oracle.qkv_linear = WithValues(oracle.qkv_linear, projected.double())
    expected = run(oracle, x, grad_out, drawn.seed)
    expected = {name.replace("qkv_linear.exact.", "qkv_linear."): value for name, value in expected.items()}
    return errors | relative_errors(actual, expected, ("qkv_linear.weight", "qkv_linear.bias"))
