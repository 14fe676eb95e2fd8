"""What the tests on drawn problems share: strategies for memory layouts, and how results are compared."""

import math
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from problems import worst
from torch import Tensor, nn

# Norm of the difference over the norm. Of thousands of drawn examples all but one or two stay below half
# of these; a wrong stride, tail or mode gives 1e-2 and more, in half precision 1e-1.
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
# Differences of terms about as large as the values' gradient, whose scores' gradients add up to 0 in a row.
CANCELLING = ("query", "key", "router", "kv_down.key")


def profile(examples: int) -> settings:
    """The same examples in every run; not shrunk, which takes minutes on the interpreter: they are small."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory; between and around its elements are NaNs, or zeros where it has no NaN.

    Attributes:
        order: its dimensions from the outermost in memory to the innermost.
        steps: for every dimension, every how many-th entry of a larger one it is.
        before: entries of the larger dimension that come before its first; all of them are an offset.
        after: entries of the larger dimension past its last.
        expanded: whether the dimension is expanded, with a stride of 0; `of` then repeats its first entry.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    expanded: tuple[bool, ...]

    def of(self, x: Tensor) -> Tensor:
        """The values of `x` so laid out; with `expanded`, those of `x` at 0 alone, of the shape of `x`."""
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

    A third of them are slices of a packed tensor, in some order of the dimensions, and so read in place where
    any are; a third have no gaps, and all of `expandable` expanded.
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

    # A scalar's gradient by .sum() is expanded in all its dimensions.
    whole = tuple(at in expandable for at in range(dim))
    repeated = st.builds(Layout, orders, ones, nothing, nothing, st.just(whole))
    return st.one_of(slices(), repeated, st.builds(Layout, orders, steps, margins, margins, expanded))


def judge(errors, drawn):
    """Fails on an error past the tolerance of the dtype that was drawn."""
    assert worst(errors.values()) < TOLERANCES[drawn.dtype], errors


class WithValues(nn.Module):
    """A projection whose values are given, for the map and for padding, and whose gradients are its own.

    Args:
        exact: the projection.
        values: what it shall make of the map.
        padding: what it shall make of a token of zeros; None where it is not asked for.
    """

    def __init__(self, exact, values, padding=None):
        super().__init__()
        self.exact, self.values, self.padding = exact, values, padding

    def forward(self, x):
        exact = self.exact(x)
        values = self.values if exact.dim() == self.values.dim() else self.padding
        return exact + (values - exact).detach()


def assume_equal_routes(actual, expected, query, key):
    """Discards an example whose routes differ by rounding; fails where they differ by more.

    Args:
        actual: regions chosen, `(N, P, topk)`.
        expected: those of the reference.
        query: region queries in float64, `(N, P, C)`.
        key: region keys.
    """
    logits = query @ key.transpose(1, 2)
    of_actual, of_expected = (logits.gather(-1, r_idx).sort(-1).values for r_idx in (actual, expected))
    # Of float32 sums over regions and channels; float32 means of a few numbers are as good as 1e-6.
    rounding = 1e-5 * (query.norm(dim=-1).max() * key.norm(dim=-1).max())
    assert (of_actual - of_expected).abs().max() <= rounding, "other regions were routed to"
    assume(torch.equal(actual.sort(-1).values, expected.sort(-1).values))


def run(module, x, grad_out, seed, call=nn.Module.__call__):
    """Output, input gradient and parameter gradients, by name; `call(module, x)` calls the module."""
    torch.manual_seed(seed)  # of fractional pooling's samples
    x = x.detach().requires_grad_()
    out = call(module, x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, (x, *parameters), grad_out, allow_unused=True)
    return {"out": out.detach(), **dict(zip(("x", *names), grads, strict=True))}


def relative_errors(actual, expected, yardstick):
    """Relative errors by name; those of gradients relative to a share of the yardstick's at least.

    For gradients may cancel, and then only rounding is left: of queries whose keys are all equal, of a router
    that has nothing to choose, of a bias common to all keys, which shifts all scores alike.
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
