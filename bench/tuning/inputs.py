"""Input sets to time a configuration on, and what the attention must make of them."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from bra_triton.backend import torch_backend
from bra_triton.bench.problems import Problem
from bra_triton.kernels.attention import launch as attention
from bra_triton.kernels.problem import Gradients, Lepe, Padding, RoutedAttention, SmallGradients
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT

# Inputs are drawn in so many sets that they do not all stay in a cache.
_SETS, _SET_BYTES = (2, 8), 256 << 20


class Inputs:
    """Input sets of one problem, and what the first of them must give."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)
        first = _draw_problem(problem, dtype, device, generator)
        bytes_of_set = 2 * first.query.untyped_storage().nbytes()
        n_sets = min(max(_SET_BYTES // bytes_of_set, _SETS[0]), _SETS[1])
        self.routed = [first] + [_draw_problem(problem, dtype, device, generator) for _ in range(n_sets - 1)]
        self.grad_out = _draw((*first.query.shape[:3], problem.dim), dtype, device, generator)
        self.gradients = _gradients(first)
        self.needs_factor = problem.routing_weight != "none"
        drawn = [_draw((problem.dim, *rest), dtype, device, generator) for rest in ((1, 3, 3), ())]
        self.lepes = [_lepe(routed, *drawn) for routed in self.routed]
        self.saved = [self.forward(index) for index in range(n_sets)]
        self.expected = self._expected()

    def _expected(self) -> dict[str, list[Tensor]]:
        problem = _widened(self.routed[0])
        gradients = _gradients(problem)
        drawn = self.lepes[0]
        assert drawn.bias is not None
        lepe = _lepe(problem, drawn.weight.float(), drawn.bias.float())
        out, share, lse = torch_backend.attention_forward(problem, lepe)
        assert share is not None  # there is LePE
        arguments = (self.grad_out.float(), problem, share, lse, gradients, self.needs_factor)
        small = torch_backend.attention_backward(*arguments)
        return {
            FORWARD: [out],
            QUERY_GRADIENT: _present(gradients.query, small.factor),
            KEY_VALUE_GRADIENT: [gradients.key, gradients.value],
        }

    def forward(self, index: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The forward on one of the sets."""
        return attention.attention_forward(self.routed[index], self.lepes[index])

    def backward(self, index: int) -> SmallGradients:
        """The backward on one of the sets, into `gradients`."""
        _, share, lse = self.saved[index]
        assert share is not None
        arguments = (self.grad_out, self.routed[index], share, lse, self.gradients, self.needs_factor)
        return attention.attention_backward(*arguments)

    def error(self, kernel: str) -> float:
        """Largest relative error of what the kernel computes from the first set."""
        if kernel == FORWARD:
            found = [self.forward(0)[0]]
        else:
            for gradient in (self.gradients.query, self.gradients.key, self.gradients.value):
                gradient.fill_(math.nan)
            small, g = self.backward(0), self.gradients
            found = _present(g.query, small.factor) if kernel == QUERY_GRADIENT else [g.key, g.value]
        pairs = zip(found, self.expected[kernel], strict=True)
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]
        return max(math.inf if math.isnan(error) else error for error in errors)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _draw_problem(
    problem: Problem, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> RoutedAttention:
    """Random maps, a random graph and, for soft routing, random weights."""

    def draw(*shape: int) -> Tensor:
        return _draw(shape, dtype, device, generator)

    widths, grid = (problem.qk_dim, problem.qk_dim, problem.dim), problem.grid
    query, key, value = draw(problem.batch, problem.height, problem.width, sum(widths)).split(widths, dim=-1)
    likes = torch.rand(problem.batch, 1, grid.n_regions, grid.n_regions, generator=generator, device=device)
    r_idx = likes.topk(problem.topk).indices.int()
    padding = Padding(draw(widths[1]), draw(widths[2])) if grid.is_padded else None
    is_soft, scale = problem.routing_weight == "soft", problem.qk_dim**-0.5
    factor = torch.rand(r_idx.shape, generator=generator, device=device) if is_soft else None
    routed = RoutedAttention(query, key, value, r_idx, grid, grid, problem.num_heads, scale, factor, padding)
    # Not `distinct`, or small regions would be masked, in tiles of no table.
    return replace(routed, distinct=True).merged() if problem.chooses_all else routed


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _lepe(problem: RoutedAttention, weight: Tensor, bias: Tensor) -> Lepe:
    fill = None if problem.padding is None else problem.padding.value
    return Lepe(problem.value, weight, bias, problem.kv_grid, fill)


def _gradients(problem: RoutedAttention) -> Gradients:
    maps = (problem.query, problem.key, problem.value)
    packed = torch.empty(*problem.query.shape[:3], sum(x.shape[-1] for x in maps)).to(problem.query)
    return Gradients(*packed.split([x.shape[-1] for x in maps], dim=-1))


def _widened(problem: RoutedAttention) -> RoutedAttention:
    """The same problem in float32."""
    padding = problem.padding and Padding(problem.padding.key.float(), problem.padding.value.float())
    query, key, value = (x.float() for x in (problem.query, problem.key, problem.value))
    return replace(problem, query=query, key=key, value=value, padding=padding)
