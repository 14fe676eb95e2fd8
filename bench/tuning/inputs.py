"""Input sets to time a configuration on, the plans that are timed, and what they must compute."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from bra_triton.backend.torch.attention import attend_routed, attention_backward
from bra_triton.backend.torch.lepe import lepe_forward
from bra_triton.backend.torch.routing import route_backward
from bra_triton.bench.problems import Problem
from bra_triton.kernels.arrays import A, Buffer, channels
from bra_triton.kernels.attention.arguments import ForwardResults, Saved
from bra_triton.kernels.attention.launch import (
    Attention,
    launch_attention,
    launch_finish,
    launch_key_value_gradient,
    launch_query_gradient,
)
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Gradients, PackedAttention, RoutedAttention
from bra_triton.kernels.routing.launch import Routing, launch_route_gradient
from bra_triton.kernels.routing.lists import form_of, launch_key_lists, launch_query_lists, take_key_lists
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT

# Inputs are drawn in so many sets that they do not all stay in a cache.
_SETS, _SET_BYTES = (2, 8), 256 << 20
Run = Callable[[int], list[Tensor]]


class Inputs:
    """Input sets of one problem, and what the first of them must give."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)
        first = _draw(problem, dtype, device, generator)
        qkv = first[0]
        assert qkv is not None
        n_sets = min(max(_SET_BYTES // (2 * qkv.nbytes), _SETS[0]), _SETS[1])
        self.sets = [first, *(_draw(problem, dtype, device, generator) for _ in range(n_sets - 1))]
        self.grad_out = torch.randn_like(qkv[..., : problem.dim]).contiguous()
        self.grad_qkv = torch.empty_like(qkv)
        forward = _plan_forward(problem, first)
        self.saved = [forward.run(*tensors)[1:] for tensors in self.sets]
        self.expected = self._expected()

    def runner(self, kernel: str) -> Run:
        """A pass that launches the kernel, with the tiles in force now, on one of the sets.

        It returns what the kernel computes; gradients of the maps are parts of `grad_qkv`.
        """
        if kernel == FORWARD:
            forward = _plan_forward(self.problem, self.sets[0])
            return lambda index: forward.run(*self.sets[index])[:1]
        backward = _plan_backward(self.problem, self._backward_inputs(0))

        def run(index: int) -> list[Tensor]:
            outputs = backward.run(*self._backward_inputs(index))
            query, *keys_values = _split(self.grad_qkv, self.problem)
            of_means = outputs[:1] if self.problem.settings.diff_routing else []
            return [query, *of_means] if kernel == QUERY_GRADIENT else keys_values

        return run

    def error(self, kernel: str, run: Run) -> float:
        """Largest relative error of what `run`, made by `runner`, computes from the first set."""
        self.grad_qkv.fill_(math.nan)
        pairs = zip(run(0), self.expected[kernel], strict=True)
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]
        return max(math.inf if math.isnan(error) else error for error in errors)

    def _backward_inputs(self, index: int) -> tuple[Tensor | None, ...]:
        return (*self.sets[index], self.grad_out, *self.saved[index], self.grad_qkv)

    def _expected(self) -> dict[str, list[Tensor]]:
        tensors = [x.float() if x is not None and x.is_floating_point() else x for x in self.sets[0]]
        packed, routed = _attention(self.problem, tensors)
        lepe = packed.lepe()
        assert lepe is not None
        out, lse = attend_routed(routed)
        maps = Gradients(*_split(torch.empty_like(packed.qkv), self.problem))
        settings, r_idx, r_weight = packed.settings, *tensors[6:]
        small = attention_backward(self.grad_out.float(), routed, out, lse, maps, settings.diff_routing)
        of_query = [maps.query]
        if small.factor is not None:
            assert r_idx is not None
            assert r_weight is not None
            assert packed.means is not None
            query, key = packed.means.split(settings.qk_dim, dim=-1)
            choices = (r_weight, r_idx, query, key, settings.routing_scale)
            of_query.append(torch.cat(route_backward(small.factor[:, 0], *choices), dim=-1))
        return {
            FORWARD: [lepe_forward(out, lepe)],
            QUERY_GRADIENT: of_query,
            KEY_VALUE_GRADIENT: [maps.key, maps.value],
        }


def _draw(
    problem: Problem, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor | None, ...]:
    """Random tensors of a `PackedAttention`, a random graph, and its weights."""

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    packed_dim, grid = 2 * problem.qk_dim + problem.dim, problem.grid
    likes = torch.rand(problem.batch, grid.n_regions, grid.n_regions, generator=generator, device=device)
    r_idx = likes.topk(problem.topk).indices.int()
    return (
        draw(problem.batch, problem.height, problem.width, packed_dim),
        None,
        draw(packed_dim) if grid.is_padded else None,
        draw(problem.batch, grid.n_regions, 2 * problem.qk_dim, dtype=torch.float32),
        draw(problem.dim, 1, 3, 3),
        draw(problem.dim),
        None if problem.chooses_all else r_idx,
        torch.rand(r_idx.shape, generator=generator, device=device),
    )


def _attention(problem: Problem, arrays: Sequence[A | None]) -> tuple[PackedAttention[A], RoutedAttention[A]]:
    """The problem of what `_draw` has drawn, or of the buffers of that, and its attention."""
    qkv, kv, padding, means, weight, bias, r_idx, r_weight = arrays[:8]
    assert qkv is not None
    assert r_weight is not None
    packed = PackedAttention(qkv, kv, padding, means, weight, bias, problem.settings)
    shape = (problem.batch, 1, problem.grid.n_regions, problem.topk)
    factor = r_weight.view(*shape) if problem.routing_weight == "soft" else None
    routed = packed.routed(None if r_idx is None else r_idx.view(*shape), factor)
    # Not `distinct`, or small regions would be masked, in tiles of no table.
    return packed, replace(routed, distinct=False)


def _split(packed: A, problem: Problem) -> list[A]:
    """Queries, keys and values of a packed map."""
    stops = (0, problem.qk_dim, 2 * problem.qk_dim, packed.shape[-1])
    return [channels(packed, *each) for each in pairwise(stops)]


def _plan_forward(problem: Problem, tensors: Sequence[Tensor | None]) -> Plan:
    """The output, the attention's share of it, and the statistic."""
    plan, packed, attention = _plan(problem, tensors)
    shape = (*packed.qkv.shape[:3], packed.dim)
    out, share = (plan.output(shape, packed.qkv.dtype) for _ in range(2))
    lse = plan.output((shape[0], problem.num_heads, *shape[1:3]), torch.float32)
    launch_attention(plan, attention, packed.lepe(), ForwardResults(out, share, lse))
    return plan


def _plan_backward(problem: Problem, tensors: Sequence[Tensor | None]) -> Plan:
    """Gradients of the maps, in the last input, and of the region queries and keys, if routing learns."""
    plan, packed, attention = _plan(problem, tensors)
    grad_out, share, lse, grad_qkv = plan.given[-4:]
    settings, maps, grad_means = packed.settings, Gradients(*_split(grad_qkv, problem)), None
    if settings.diff_routing:
        assert packed.means is not None
        grad_means = plan.output(packed.means.shape, torch.float32)
    statistics, shares = launch_query_gradient(
        plan, attention, Saved(share, lse, grad_out), maps.query, settings.diff_routing
    )
    lists = launch_query_lists(plan, attention.problem, attention.lists)
    is_padded = attention.problem.padding is not None
    launch_finish(
        plan, launch_key_value_gradient(plan, attention, lists, statistics, grad_out, maps, is_padded)
    )
    if grad_means is not None:
        r_idx, r_weight = plan.inputs[6:8]
        assert packed.means is not None
        assert r_idx is not None
        assert shares is not None
        assert lists.inverse is not None
        (query, key), grads = (
            [channels(x, 0, settings.qk_dim), channels(x, settings.qk_dim, 2 * settings.qk_dim)]
            for x in (packed.means, grad_means)
        )
        routing = Routing(query, key, r_weight, r_idx, settings.routing_scale)
        launch_route_gradient(plan, routing, shares, lists.inverse, *grads)
    return plan


def _plan(
    problem: Problem, tensors: Sequence[Tensor | None]
) -> tuple[Plan, PackedAttention[Buffer], Attention]:
    """A plan that writes the attention's lists."""
    first = tensors[0]
    assert first is not None
    plan = Plan(tensors, first.device)
    packed, routed = _attention(problem, plan.inputs)
    form = form_of(routed)
    lists = take_key_lists(routed, form, plan.scratch)
    launch_key_lists(plan, routed, lists)
    return plan, packed, Attention(routed, form, lists)
