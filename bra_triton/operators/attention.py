"""Routing, attention and LePE of a packed projection, as PyTorch sees it.

| operator | gradient |
|---|---|
| `bra_triton::attend` | for `qkv`, `kv`, `padding`, `means`, `lepe_weight`, `lepe_bias` |
| `bra_triton::attend_backward` | none |

`attend` is what the rest of the package calls. Eagerly it is an `autograd.Function` and a call of the
backend; under a compiler, a dispatch mode or a transform it is the operator, which computes the same. The
operators trust their callers: arguments are checked, and contiguous.

This file is the only one that takes a `PackedAttention` apart for a schema and puts it together again.
"""

from collections.abc import Sequence
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
    gradient_operator,
    is_seen_by_none,
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
    if not eager or not is_seen_by_none(tensors):
        return torch.ops.bra_triton.attend(*tensors, *_numbers(problem.settings, backend), trains)[0]
    if trains:
        return _Attend.apply(problem.settings, backend, *tensors)
    return fused_kernels(backend).attend(problem, trains=False, own_form=True).out


class _Attend(torch.autograd.Function):
    """`attend` with a gradient, past PyTorch's dispatcher.

    An operator's registered autograd formula costs 75 us of the CPU's time a forward and 113 us a step with
    these arguments, this 14 and 43.
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, backend: str, *tensors: Tensor | None) -> Tensor:
        problem = _problem(tensors, settings)
        out, attention, *rest = fused_kernels(backend).attend(problem, trains=True, own_form=True)
        if problem.lepe_weight is None:
            attention = out
        ctx.save_for_backward(*tensors, attention, *rest)
        ctx.settings, ctx.backend, ctx.tiles = settings, backend, tiles.in_force()
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: non-reentrant checkpointing lets no one ask again
        tensors, rest, needs = saved[:_N_TENSORS], saved[_N_TENSORS:], ctx.needs_input_grad[2:]
        problem = _problem(tensors, ctx.settings)
        result = AttentionResult(problem.qkv, *rest)
        # Autograd runs this in a thread of its own, to which what is in force must be taken along.
        with nullcontext() if ctx.tiles is None else tiles.restored(ctx.tiles):
            gradients = _backward(grad_out, problem, result, ctx.backend, needs)
        return None, None, *refusing_second_derivative(gradients, grad_out, *tensors)


@operator("attend", f"({_TENSORS}, {_NUMBERS}, bool trains) -> (Tensor out, {_RESULT})")
def _attend_operator(*arguments: Any) -> tuple[Tensor, ...]:
    """See `attend`: the output and, empty where there is none, what `AttentionResult` has besides."""
    problem, backend, (trains,) = _unpack(arguments)
    result = fused_kernels(backend).attend(problem, trains)
    out = result.out
    small = (result.attention, result.lse, result.r_weight, result.r_idx)
    return out, *(or_empty(x, out) for x in small)


@torch.library.register_fake(_attend_operator)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem, _, (trains,) = _unpack(arguments)
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


@gradient_operator(
    "attend_backward",
    f"(Tensor grad_out, {_TENSORS}, {_RESULT}, {_NUMBERS}, bool[] needs) -> ("
    + ", ".join(["Tensor"] * _N_TENSORS)
    + ")",
)
def _attend_backward_operator(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensors that `attend` takes, in its order; empty where there are none."""
    tensors, saved, rest = (
        arguments[:_N_TENSORS],
        arguments[_N_TENSORS : _N_TENSORS + _N_RESULT],
        arguments[_N_TENSORS + _N_RESULT :],
    )
    problem, backend, (needs,) = _unpack((*tensors, *rest))
    result = AttentionResult(saved[0], saved[0], *map(or_none, saved[1:]))
    gradients = _backward(grad_out, problem, result, backend, needs)
    return tuple(or_empty(x, problem.qkv) for x in gradients)


@torch.library.register_fake(_attend_backward_operator)
def _(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, needs = arguments[:_N_TENSORS], arguments[-1]
    qkv = tensors[0]
    return tuple(
        x.new_empty(x.shape) if x is not None and (needed or x is qkv) else qkv.new_empty(0)
        for x, needed in zip(tensors, needs, strict=True)
    )


def _backward(
    grad_out: Tensor,
    problem: PackedAttention[Tensor],
    result: AttentionResult,
    backend: str,
    needs: Sequence[bool],
) -> PackedGradients:
    if not grad_out.shape[0]:  # nothing was saved either
        zeros = [
            x.new_zeros(x.shape) if x is not None and needed else None
            for x, needed in zip(problem.tensors, needs, strict=True)
        ]
        return PackedGradients(problem.qkv.new_zeros(problem.qkv.shape), *zeros[1:])
    with torch.no_grad():  # create_graph=True runs a backward with gradients enabled
        return fused_kernels(backend).attend_backward(grad_out.contiguous(), problem, result, Needs(*needs))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.numbers = inputs[:_N_TENSORS], inputs[_N_TENSORS:-1]
    out, attention, *rest = output
    ctx.save_for_backward(*tensors, out if tensors[4] is None else attention, *rest)
    ctx.mark_non_differentiable(attention, *rest)
    ctx.set_materialize_grads(False)  # or autograd fills a map with zeros for `attention`


def _backward_of_operator(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    n_others = _N_NUMBERS + 1
    if grad_out is None:
        return (None,) * (_N_TENSORS + n_others)
    gradients = _by_operator(grad_out, ctx.saved_tensors, ctx.numbers, ctx.needs_input_grad[:_N_TENSORS])
    return *gradients, *(None,) * n_others


torch.library.register_autograd(_attend_operator, _backward_of_operator, setup_context=_setup_context)


def _by_operator(
    grad_out: Tensor, saved: Sequence[Tensor], numbers: tuple[Any, ...], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the tensors, by the operator."""
    gradients = _attend_backward_operator(grad_out, *saved, *numbers, needs)
    return [
        gradient if needed and x is not None else None
        for gradient, needed, x in zip(gradients, needs, saved[:_N_TENSORS], strict=True)
    ]


def _numbers(settings: Settings, backend: str) -> tuple[Any, ...]:
    """What a schema can say of the settings, and the backend."""
    return (
        [settings.qk_dim, settings.num_heads, settings.topk, *settings.grid.numbers],
        [settings.scale, settings.routing_scale],
        settings.routing_weight,
        [settings.diff_routing, settings.counts_padding],
        backend,
    )


def _unpack(arguments: Sequence[Any]) -> tuple[PackedAttention[Tensor], str, Sequence[Any]]:
    """Undoes `_numbers`: the problem, the backend, and the arguments that follow."""
    tensors, rest = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
    (qk_dim, num_heads, topk, *grid), scales, routing_weight, flags, backend = rest[:_N_NUMBERS]
    scale, routing_scale = scales
    diff_routing, counts_padding = flags
    settings = Settings(
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
    return _problem(tensors, settings), backend, rest[_N_NUMBERS:]


def _problem(tensors: Sequence[Tensor | None], settings: Settings) -> PackedAttention[Tensor]:
    qkv, kv, padding, means, lepe_weight, lepe_bias = tensors
    assert qkv is not None
    return PackedAttention(qkv, kv, padding, means, lepe_weight, lepe_bias, settings)
