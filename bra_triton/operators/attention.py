"""Routing, attention and LePE of a packed projection, as PyTorch sees it.

`attend` is what the rest of the package calls. Eagerly it is an `autograd.Function` and a call of the
backend; under a compiler, a dispatch mode or a transform it is another one over the operators, which compute
the same. The operators themselves have no gradient, and trust their callers: arguments are checked, and
contiguous.

This file is the only one that takes a `PackedAttention` apart for a schema and puts it together again.
"""

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backend.kernels import fused_kernels
from ..kernels import tiles
from ..kernels.grid import RegionGrid
from ..kernels.problem import (
    AttentionResult,
    Needs,
    PackedAttention,
    PackedGradients,
    Settings,
    statistic_dtype,
)
from .library import (
    is_seen,
    needs_gradient,
    operator,
    or_empty,
    or_none,
    refusing_second_derivative,
)

_TENSORS = "Tensor qkv, Tensor? kv, Tensor? padding, Tensor? means, Tensor? lepe_weight, Tensor? lepe_bias"
_N_TENSORS = 6
_NUMBERS = "SymInt[] sizes, float[] scales, str routing_weight, bool[] flags, str backend"
_N_NUMBERS = 5
_RESULT = "Tensor attention, Tensor lse, Tensor r_weight, Tensor r_idx"
_N_RESULT = 4


def attend(problem: PackedAttention[Tensor], backend: str, eager: bool) -> Tensor:
    """Routes, attends and adds LePE: `(N, H, W, dim)`; differentiable.

    Args:
        problem: what to compute.
        backend: "triton" or "torch".
        eager: whether no graph is being recorded.
    """
    tensors = problem.tensors
    trains = needs_gradient(tensors)
    if not eager or is_seen(tensors):
        numbers = _numbers(problem.settings, backend)
        if trains:
            return _AttendByOperator.apply(*tensors, *numbers)[0]
        return torch.ops.bra_triton.attend(*tensors, *numbers, False)[0]
    if trains:
        return _Attend.apply(problem.settings, problem.plans, backend, *tensors)
    return fused_kernels(backend).attend(problem, trains=False, own_form=True).out


class _Attend(torch.autograd.Function):
    """`attend` with a gradient, past PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, plans: Any, backend: str, *tensors: Tensor | None) -> Tensor:
        problem = _problem(tensors, settings, plans)
        out, attention, *rest = fused_kernels(backend).attend(problem, trains=True, own_form=True)
        if problem.lepe_weight is None:
            attention = out
        ctx.save_for_backward(*tensors, attention, *rest)
        ctx.settings, ctx.plans, ctx.backend, ctx.tiles = settings, plans, backend, tiles.in_force()
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing lets no one ask again
        tensors, rest, needs = saved[:_N_TENSORS], saved[_N_TENSORS:], ctx.needs_input_grad[3:]
        problem = _problem(tensors, ctx.settings, ctx.plans)
        result = AttentionResult(problem.qkv, *rest)
        # Autograd runs this in a thread of its own, to which what is in force must be taken along.
        with nullcontext() if ctx.tiles is None else tiles.restored(ctx.tiles):
            gradients = _backward(grad_out, problem, result, ctx.backend, needs)
        return None, None, None, *refusing_second_derivative(gradients, grad_out, *tensors)


class _AttendByOperator(torch.autograd.Function):
    """`attend` with a gradient, by the operators.

    Not their own autograd formula, by `torch.library.register_autograd`: a compiled graph passes it at every
    call, though gradients are none of its business there, for 10 us of the CPU's time.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.bra_triton.attend(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.numbers = inputs[:_N_TENSORS], inputs[_N_TENSORS:]
        out, attention, *rest = output
        ctx.save_for_backward(*tensors, out if tensors[4] is None else attention, *rest)
        ctx.mark_non_differentiable(attention, *rest)
        ctx.set_materialize_grads(False)  # or autograd fills a map with zeros for `attention`

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * (_N_TENSORS + _N_NUMBERS)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:_N_TENSORS]
        found = iter(torch.ops.bra_triton.attend_backward(grad_out, *saved, *ctx.numbers, needs))
        gradients = [next(found) if is_wanted else None for is_wanted in _wanted(saved, needs)]
        refusing = refusing_second_derivative(gradients, grad_out, *saved[:_N_TENSORS])
        return *refusing, *(None,) * _N_NUMBERS


@operator("attend", f"({_TENSORS}, {_NUMBERS}, bool trains) -> (Tensor out, {_RESULT})")
def _attend_operator(*given: Any) -> tuple[Tensor, ...]:
    """See `attend`: the output and, empty where there is none, what `AttentionResult` has besides."""
    *arguments, trains = given
    problem, backend = _known_problem(arguments)
    result = fused_kernels(backend).attend(problem, trains)
    out = result.out
    return out, *[or_empty(x, out) for x in result[1:-1]]


@torch.library.register_fake(_attend_operator)
def _(*given: Any) -> tuple[Tensor, ...]:
    *arguments, trains = given
    problem = _problem(arguments[:_N_TENSORS], _settings(*arguments[_N_TENSORS:-1]))
    qkv, settings = problem.qkv, problem.settings
    batch, height, width, _ = qkv.shape
    out = qkv.new_empty(batch, height, width, problem.dim)
    statistic = statistic_dtype(qkv.dtype)
    lse = r_weight = r_idx = None
    if trains:
        lse = qkv.new_empty(batch, settings.num_heads, height, width, dtype=statistic)
    choices = (batch, settings.grid.n_regions, settings.topk)
    if problem.weighs:
        r_weight = qkv.new_empty(choices, dtype=statistic)
    if not settings.chooses_all:
        r_idx = qkv.new_empty(choices, dtype=torch.int32)
    attention = torch.empty_like(out) if trains and problem.lepe_weight is not None else None
    return out, *(or_empty(x, out) for x in (attention, lse, r_weight, r_idx))


@operator(
    "attend_backward", f"(Tensor grad_out, {_TENSORS}, {_RESULT}, {_NUMBERS}, bool[] needs) -> Tensor[]"
)
def _attend_backward_operator(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of the tensors that `attend` takes, in its order: of `qkv`, and of those that are needed."""
    tensors, rest = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
    saved, numbers, needs = rest[:_N_RESULT], rest[_N_RESULT:-1], rest[-1]
    problem, backend = _known_problem((*tensors, *numbers))
    result = AttentionResult(problem.qkv, saved[0], *map(or_none, saved[1:]))
    gradients = _backward(grad_out, problem, result, backend, _wanted(tensors, needs))
    return [x for x in gradients if x is not None]


@torch.library.register_fake(_attend_backward_operator)
def _(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    tensors, needs = arguments[:_N_TENSORS], arguments[-1]
    wanted = zip(tensors, _wanted(tensors, needs), strict=True)
    return [x.new_empty(x.shape) for x, is_wanted in wanted if is_wanted]


def _wanted(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[bool]:
    """Which of the tensors get a gradient."""
    return [True, *(x is not None and n for x, n in zip(tensors[1:_N_TENSORS], needs[1:], strict=True))]


def _backward(
    grad_out: Tensor,
    problem: PackedAttention[Tensor],
    result: AttentionResult,
    backend: str,
    needs: Sequence[bool],
) -> PackedGradients:
    return fused_kernels(backend).attend_backward(grad_out.contiguous(), problem, result, Needs(*needs))


def _numbers(settings: Settings, backend: str) -> tuple[Any, ...]:
    """What a schema can say of the settings, and the backend."""
    return (
        [settings.qk_dim, settings.num_heads, settings.topk, *settings.grid.numbers],
        [settings.scale, settings.routing_scale],
        settings.routing_weight,
        [settings.diff_routing, settings.counts_padding],
        backend,
    )


def _settings(
    sizes: Sequence[int], scales: Sequence[float], routing_weight: str, flags: Sequence[bool]
) -> Settings:
    """Undoes `_numbers`."""
    qk_dim, num_heads, topk, *grid = sizes
    scale, routing_scale = scales
    diff_routing, counts_padding = flags
    return Settings(
        qk_dim,
        num_heads,
        RegionGrid(*grid),
        topk,
        scale,
        routing_scale,
        routing_weight,
        diff_routing,
        counts_padding,
    )


def _known_problem(arguments: Sequence[Any]) -> tuple[PackedAttention[Tensor], str]:
    """The problem of an operator's tensors and numbers, with a place for its plans; and the backend."""
    tensors, (*numbers, backend) = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
    sizes, scales, routing_weight, flags = numbers
    key = (
        *(backend, routing_weight, tuple(sizes), tuple(scales), tuple(flags), tensors[0].dtype),
        *(None if x is None else x.shape for x in tensors),
        tensors[0].device,
    )
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[key] = _settings(*numbers), {}
    return _problem(tensors, *known), backend


# What `_known_problem` has made before: to make it anew would cost as much as the launches.
_MOST_KNOWN = 1024
_known: dict[Hashable, tuple[Settings, dict[Hashable, Any]]] = {}


def _problem(
    tensors: Sequence[Tensor | None], settings: Settings, plans: Any = None
) -> PackedAttention[Tensor]:
    qkv, kv, padding, means, lepe_weight, lepe_bias = tensors
    assert qkv is not None
    return PackedAttention(qkv, kv, padding, means, lepe_weight, lepe_bias, settings, plans)
