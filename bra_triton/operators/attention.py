"""Makes routing, attention and LePE of a packed projection differentiable, in eager and compiled calls.

The rest of the package calls `attend`. In an eager call, `attend` calls the backend inside an
`autograd.Function`. Under a compiler, a dispatch mode or a transform of `torch.func` it uses another
`autograd.Function`, which calls the operators; they compute the same. The operators have no autograd formula,
and do not check their arguments: callers have checked them and made them contiguous.

Tensors with four axes that a forward takes, or leaves for its backward, get a fifth axis of one entry
(`_set_apart`). If a convolution follows, Inductor treats every tensor with four axes as images, and converts
those that are kept for the backward to channels-last memory. That would copy the packed projection in the
forward and copy it back in the backward, and it fails for sizes that are symbols (PyTorch 2.14).

This file is the only one that takes a `PackedAttention` apart for a schema and puts it together again.
"""

import math
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backend.kernels import fused_kernels
from ..kernels import overrides
from ..kernels.bounded import Bounded
from ..kernels.grid import RegionGrid
from ..kernels.problem import (
    Needs,
    PackedAttention,
    PackedGradients,
    Settings,
)
from .library import (
    Transformable,
    Witness,
    fake_of,
    flops_of,
    is_seen,
    needs_gradient,
    operator,
    refuse_tangents,
    refusing_batches,
    refusing_second_derivative,
)

_TENSORS = "Tensor qkv, Tensor? kv, Tensor? padding, Tensor? means, Tensor? lepe_weight, Tensor? lepe_bias"
_N_TENSORS, _N_MAPS = 6, 2
_NUMBERS = "SymInt[] sizes, float[] scales, str routing_weight, bool[] flags, str backend"
_N_NUMBERS = 5


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
        if eager:
            refuse_tangents(tensors)
        numbers = _numbers(problem.settings, backend)
        if trains:
            function = _AttendTransformed if eager else _AttendByOperator
            out = function.apply(*map(_set_apart, tensors[:_N_MAPS]), *tensors[_N_MAPS:], *numbers)[0]
            # Without LePE the backward reads the output, which the caller may change in place: return a copy.
            # Inductor drops the copy.
            return _put_back(out).clone() if problem.lepe_weight is None else out
        return torch.ops.bra_triton.attend(*tensors, *numbers, False)[0]
    if trains:
        return _Attend.apply(problem.settings, problem.plans, backend, *tensors)
    return fused_kernels(backend).attend(problem, trains=False)[0]


class _Attend(torch.autograd.Function):
    """`attend` with a gradient, without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, plans: Any, backend: str, *tensors: Tensor | None) -> Tensor:
        problem = PackedAttention.of(tensors, settings, plans)
        out, saved = fused_kernels(backend).attend(problem, trains=True)
        needs_output = problem.lepe_weight is None  # with LePE the backward does not read the output
        ctx.witness = Witness(out) if needs_output else None
        ctx.save_for_backward(*tensors, out.data if needs_output else None, *saved)
        ctx.settings, ctx.plans, ctx.backend = settings, plans, backend
        ctx.overrides = overrides.in_force()
        return out

    @staticmethod
    @refusing_batches
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        all_saved = ctx.saved_tensors  # non-reentrant checkpointing permits only one access
        tensors, out, saved = _parts(all_saved)
        problem, needs = PackedAttention.of(tensors, ctx.settings, ctx.plans), ctx.needs_input_grad[3:]
        # Autograd runs this in another thread, so what was set in the forward's thread is set here, too.
        with overrides.use(**ctx.overrides._asdict()) if any(ctx.overrides) else nullcontext():
            if ctx.witness is not None and ctx.witness.sees_change:
                out = fused_kernels(ctx.backend).attend(problem, trains=False)[0]
            gradients = _backward(grad_out, problem, out, saved, needs, ctx.backend)
        return None, None, None, *refusing_second_derivative(gradients, grad_out, *tensors)


class _AttendByOperator(torch.autograd.Function):
    """`attend` with a gradient, computed by the operators.

    The operators have no autograd formula (`torch.library.register_autograd`), because a compiled graph would
    run it in every call, for 10 us of CPU time, although the graph needs no gradients there.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        out, saved = torch.ops.bra_triton.attend(*arguments, True)
        return out, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.numbers = inputs[:_N_TENSORS], inputs[_N_TENSORS:]
        out, *saved = output
        *_, lepe_weight, _ = tensors
        ctx.save_for_backward(*tensors, out if lepe_weight is None else None, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * (_N_TENSORS + _N_NUMBERS)
        tensors, out, saved = _parts(ctx.saved_tensors)
        wanted = _wanted(tensors, ctx.needs_input_grad)
        found = iter(
            torch.ops.bra_triton.attend_backward(
                _put_back(grad_out), *tensors, out, saved, *ctx.numbers, wanted
            )
        )
        gradients = [next(found) if is_wanted else None for is_wanted in wanted]
        gradients[:_N_MAPS] = map(_set_apart, gradients[:_N_MAPS])
        return *refusing_second_derivative(gradients, grad_out, *tensors), *(None,) * _N_NUMBERS


class _AttendTransformed(Transformable, _AttendByOperator):
    """`_AttendByOperator` for eager calls, which may be under a transform of `torch.func`."""


@operator(
    "attend", f"({_TENSORS}, {_NUMBERS}, bool trains) -> (Tensor out, Tensor[] saved)", has_gradient=False
)
def _attend_operator(*given: Any) -> tuple[Tensor, list[Tensor]]:
    """Computes `attend`; returns the output and the tensors that the backward reads."""
    *arguments, trains = given
    problem, backend = _known_problem(arguments)
    return _kept_apart(problem, *fused_kernels(backend).attend(problem, trains), trains)


def _kept_apart(
    problem: PackedAttention[Tensor], out: Tensor, saved: Sequence[Tensor], trains: bool
) -> tuple[Tensor, list[Tensor]]:
    """The results of a forward, with `_set_apart` applied to those that the backward reads."""
    reads_output = trains and problem.lepe_weight is None
    return _set_apart(out) if reads_output else out, [_set_apart(x) for x in saved]


@fake_of(_attend_operator)
def _(*given: Any) -> tuple[Tensor, list[Tensor]]:
    *arguments, backend, trains = given
    tensors = [_put_back(x) for x in arguments[:_N_MAPS]] + arguments[_N_MAPS:_N_TENSORS]
    problem = PackedAttention.of(tensors, _settings(*arguments[_N_TENSORS:]))
    out = problem.qkv.new_empty(*problem.qkv.shape[:3], problem.dim)
    saved = fused_kernels(backend).saved_like(problem) if trains else []
    return _kept_apart(problem, out, saved, trains)


@flops_of(_attend_operator)
def _(*given: Any, **_: Any) -> int:
    *shapes, _, _ = given
    settings, dim, scores, lepe = _counts(shapes)
    routing = settings.region_logits * settings.qk_dim
    return 2 * shapes[0][0] * (routing + scores * (settings.qk_dim + dim) + lepe)


@operator(
    "attend_backward",
    f"(Tensor grad_out, {_TENSORS}, Tensor? out, Tensor[] saved, {_NUMBERS}, bool[] wanted) -> Tensor[]",
    has_gradient=False,
)
def _attend_backward_operator(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    """The wanted gradients of the tensors that `attend` takes, in the order of these tensors."""
    tensors, (out, saved, *numbers, wanted) = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
    problem, backend = _known_problem((*tensors, *numbers))
    found = _backward(grad_out, problem, _put_back(out), [_put_back(x) for x in saved], wanted, backend)
    return [
        torch.zeros_like(x) if gradient is None else gradient  # None for a padding that pads nothing
        for x, gradient, is_wanted in zip(tensors, found, wanted, strict=True)
        if is_wanted
    ]


@fake_of(_attend_backward_operator)
def _(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    wanted = zip(map(_put_back, arguments[:_N_TENSORS]), arguments[-1], strict=True)
    return [x.new_empty(x.shape) for x, is_wanted in wanted if is_wanted]


@flops_of(_attend_backward_operator)
def _(grad_out: Any, *given: Any, **_: Any) -> int:
    shapes, (_, _, *numbers, _, _) = given[:_N_TENSORS], given[_N_TENSORS:]
    settings, dim, scores, lepe = _counts((*shapes, *numbers))
    routing = 2 * settings.region_logits * settings.qk_dim * settings.diff_routing
    # The backward computes the scores again; PyTorch counts that for its own attention, too.
    return 2 * shapes[0][0] * (routing + scores * (3 * settings.qk_dim + 2 * dim) + 2 * lepe)


def _counts(shapes: Sequence[Any]) -> tuple[Settings, int, int, int]:
    """Settings, channels of values; and for one image with padding, scores of a head, products of LePE."""
    qkv, kv, _, _, lepe_weight, _, *numbers = shapes
    settings = _settings(*numbers)
    grid, dim = settings.grid, qkv[-1] - 2 * settings.qk_dim
    region_keys = grid.region_tokens if kv is None else kv[1] * kv[2] // grid.n_regions
    lepe = 0 if lepe_weight is None else grid.n_regions * grid.region_tokens * math.prod(lepe_weight)
    return settings, dim, settings.token_scores(region_keys), lepe


def _wanted(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[bool]:
    """Whether each of the tensors gets a gradient; `qkv`, the first, always does."""
    others = zip(tensors[1:], needs[1:_N_TENSORS], strict=True)
    return [True, *(x is not None and is_needed for x, is_needed in others)]


def _set_apart(x: Any) -> Any:
    """Gives a tensor with four axes a fifth, of one entry, before the last; returns all else unchanged."""
    return x if x is None or x.dim() != 4 else x.unsqueeze(-2)


def _put_back(x: Any) -> Any:
    """Undoes `_set_apart`."""
    return x if x is None or x.dim() != 5 else x.squeeze(-2)


def _backward(
    grad_out: Tensor,
    problem: PackedAttention[Tensor],
    out: Tensor | None,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> PackedGradients:
    if not grad_out.shape[0]:
        _, *others = zip(problem.tensors, needs, strict=True)
        zeros = [x.new_zeros(x.shape) if x is not None and needed else None for x, needed in others]
        return PackedGradients(problem.qkv.new_zeros(problem.qkv.shape), *zeros)
    return fused_kernels(backend).attend_backward(grad_out.contiguous(), problem, out, saved, Needs(*needs))


def _parts(
    saved: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor | None], Tensor | None, list[Tensor]]:
    """Splits the tensors saved for a backward: the problem's, the output, and those of the backend."""
    rest = [x for x in saved[_N_TENSORS + 1 :] if x is not None]
    return saved[:_N_TENSORS], saved[_N_TENSORS], rest


def _numbers(settings: Settings, backend: str) -> tuple[Any, ...]:
    """The settings, as lists of numbers and a string, which a schema can have; and the backend's name."""
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
    """The problem that an operator's arguments describe, with a place for its plans; the backend's name."""
    tensors, (*numbers, backend) = arguments[:_N_TENSORS], arguments[_N_TENSORS:]
    sizes, scales, routing_weight, flags = numbers
    qkv, kv, padding, means, lepe_weight, lepe_bias = tensors
    key = (
        *(backend, routing_weight, *sizes, *scales, *flags, qkv.shape, qkv.dtype, qkv.device),
        *(None if x is None else x.shape for x in (kv, lepe_weight)),
        *(x is None for x in (padding, means, lepe_bias)),
    )
    known = _known.get(key)
    if known is None:
        known = _known[key] = _settings(*numbers), Bounded()
    problem = PackedAttention.of([*map(_put_back, tensors[:_N_MAPS]), *tensors[_N_MAPS:]], *known)
    if problem.padding is not None and not problem.settings.grid.is_padded:
        problem.padding = None  # a compiled graph for several sizes passes a padding even if none is needed
    return problem, backend


# Settings and plans that `_known_problem` has made. To make them again would cost as much as the launches.
_known: dict[Hashable, tuple[Settings, dict[Hashable, Any]]] = Bounded()
