"""Helpers for tests on drawn problems: strategies for memory layouts, and how results are compared."""

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from problems import worst
from torch import Tensor, nn

# Norm of the difference over the norm of the truth. Of thousands of drawn examples all except one or two stay
# below half of these; a wrong stride, tail or mode gives 1e-2 and more, in half precision 1e-1.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}
HALF = (torch.float16, torch.bfloat16)
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="drawn tensors are on the CPU"
)
DTYPES = {"torch": (torch.float32, torch.float64, *HALF), "triton": (torch.float32, *HALF)}
# Gradients in which large terms cancel: the gradients of the scores in a row add up to 0. What is left is a
# difference of terms that are about as large as the values' gradient.
CANCELLING = ("query", "key", "router", "kv_down.key")


def profile(examples: int) -> settings:
    """Settings of hypothesis: the same examples in every run.

    A failing example is not shrunk: it is small already, and that takes minutes on the interpreter.
    """
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)


@dataclass(frozen=True)
class Layout:
    """How a tensor is laid out in memory: as a slice, with steps, of a larger tensor.

    The elements of the larger tensor outside the slice are NaN, or 0 in dtypes without NaN.

    Attributes:
        order: the dimensions from the outermost in memory to the innermost.
        steps: for every dimension, the step of the slice.
        before: for every dimension, entries of the larger tensor before the slice (the storage offset).
        after: for every dimension, entries of the larger tensor after the slice.
        expanded: for every dimension, whether it is expanded (stride 0); `of` then repeats its first entry.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    expanded: tuple[bool, ...]

    def of(self, x: Tensor) -> Tensor:
        """A copy of `x` in this layout. Of an expanded dimension only the entry 0 of `x` is used."""
        kept = x[tuple(slice(0, 1) if expanded else slice(None) for expanded in self.expanded)]
        spans, cut = [], []
        for size, step, before, after in zip(kept.shape, self.steps, self.before, self.after, strict=True):
            end = before + max(0, size - 1) * step + 1
            spans.append(end + after)
            cut.append(slice(before, end if size else before, step))
        memory = x.new_full([spans[dim] for dim in self.order], math.nan if x.is_floating_point() else 0)
        laid_out = memory.permute([self.order.index(dim) for dim in range(x.dim())])[tuple(cut)]
        return laid_out.copy_(kept).expand(x.shape)


def layouts(dim: int, expandable: tuple[int, ...] = ()) -> st.SearchStrategy[Layout]:
    """Layouts of tensors of `dim` dimensions, of which `expandable` may be expanded.

    A third are slices of a packed tensor along its innermost dimension, with the dimensions in any order: if
    any layout is read in place, these are. A third have no gaps, and all of `expandable` are expanded. The
    others have any steps, margins and expanded dimensions.
    """
    nothing, ones = st.just((0,) * dim), st.just((1,) * dim)
    margins = st.tuples(*(st.integers(0, 2) for _ in range(dim)))
    steps = st.tuples(*(st.sampled_from((1, 1, 2, 3)) for _ in range(dim)))
    expanded = st.tuples(*(st.booleans() if at in expandable else st.just(False) for at in range(dim)))
    orders = st.permutations(range(dim)).map(tuple)

    @st.composite
    def slices(draw):
        order = draw(orders)
        before, after = (
            tuple(draw(st.integers(0, 9)) if at == order[-1] else 0 for at in range(dim)) for _ in range(2)
        )
        return Layout(order, (1,) * dim, before, after, (False,) * dim)

    # The gradient of `x.sum()` is expanded in all dimensions of `x`.
    whole = tuple(at in expandable for at in range(dim))
    repeated = st.builds(Layout, orders, ones, nothing, nothing, st.just(whole))
    return st.one_of(slices(), repeated, st.builds(Layout, orders, steps, margins, margins, expanded))


def judge(errors, drawn):
    """Fails if an error exceeds the tolerance of the dtype that was drawn."""
    assert worst(errors.values()) < TOLERANCES[drawn.dtype], errors


class WithValues(nn.Module):
    """A projection whose results are given; its gradients are those of `exact`.

    Args:
        exact: the projection.
        values: the result for the map.
        padding: the result for a token of zeros; None if the module pads no map before the projection.
    """

    def __init__(self, exact, values, padding=None):
        super().__init__()
        self.exact, self.values, self.padding = exact, values, padding

    def forward(self, x):
        exact, values = self.exact(x), self.values
        if exact.shape != values.shape:
            values = self.padding.expand(exact.shape).clone()
            values[:, : self.values.shape[1], : self.values.shape[2]] = self.values
        return exact + (values - exact).detach()


def assume_equal_routes(actual, expected, query, key):
    """Discards an example in which rounding changes the chosen regions; fails if they differ otherwise.

    Args:
        actual: regions chosen, `(N, P, topk)`.
        expected: those of the reference.
        query: region queries in float64, `(N, P, C)`.
        key: region keys.
    """
    logits = query @ key.transpose(1, 2)
    of_actual, of_expected = (logits.gather(-1, r_idx).sort(-1).values for r_idx in (actual, expected))
    # Rounding of float32 sums over a region's tokens and over channels; means of a few numbers err by 1e-6.
    rounding = 1e-5 * (query.norm(dim=-1).max() * key.norm(dim=-1).max())
    assert (of_actual - of_expected).abs().max() <= rounding, "other regions were routed to"
    assume(torch.equal(actual.sort(-1).values, expected.sort(-1).values))


def run(module, x, grad_out, seed, call=nn.Module.__call__):
    """Output, input gradient and parameter gradients, by name; `call(module, x)` calls the module."""
    torch.manual_seed(seed)  # fractional pooling draws samples
    x = x.detach().requires_grad_()
    out = call(module, x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, (x, *parameters), grad_out, allow_unused=True)
    return {"out": out.detach(), **dict(zip(("x", *names), grads, strict=True))}


def relative_errors(actual, expected, yardstick):
    """Relative errors by name.

    A gradient's error is divided by its norm or, if that is larger, by the largest norm of the gradients in
    `yardstick` (a tenth of it, unless the gradient is one of `CANCELLING`). For gradients may cancel, so that
    only rounding is left: those of queries whose keys are all equal, of a router that has nothing to choose,
    or of a bias common to all keys, which shifts all scores alike.
    """
    assert actual.keys() == expected.keys()
    scale = max(torch.linalg.vector_norm(expected[name]).item() for name in yardstick)
    errors = {}
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        assert actual[name].shape == value.shape, name
        norm = torch.linalg.vector_norm(value).item()
        if name != "out":
            norm = max(norm, scale if name.startswith(CANCELLING) else scale / 10)
        errors[name] = torch.linalg.vector_norm(actual[name].double() - value).item() / max(norm, 1e-300)
    return errors
