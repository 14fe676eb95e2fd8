"""How an operator is entered in PyTorch's dispatcher, and what the operators have in common."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("bra_triton", "FRAGMENT")


def operator(name: str, schema: str, has_gradient: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: makes `bra_triton::<name>` of a function that changes no argument.

    `torch.library.custom_op` would do the same, but PyTorch 2.11 runs what is inside with Dynamo's hook on
    every call of a Python function. Timed by hand on Python 3.12, a launch that took 24 us of the CPU's time
    took 106 us as such an operator; on a slower machine of the kind 33 us became 57 us as this one.

    Args:
        name: of the operator.
        schema: arguments and results, as in PyTorch's `native_functions.yaml`.
        has_gradient: whether an autograd formula will be registered. If not, PyTorch records nothing of the
            operator, and gradients are its caller's affair.
    """

    def make(function: Callable[..., Any]) -> Any:
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        if not has_gradient:
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        made = getattr(torch.ops.bra_triton, name).default
        made.__doc__ = function.__doc__
        return made

    return make


def gradient_operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """`operator` for a function that computes gradients, and has none itself: differentiating it raises."""

    def make(function: Callable[..., Any]) -> Any:
        made = operator(name, schema)(function)
        torch.library.register_autograd(made, _refuse)
        return made

    return make


def _refuse(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("the fused backends have no second derivatives; backend='reference' has")


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *others: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(_refuse)


def refusing_second_derivative(
    gradients: Sequence[Tensor | None], *inputs: Tensor | None
) -> Sequence[Tensor | None]:
    """Gradients that an `autograd.Function` returns, such that differentiating them raises.

    They have no graph: without this, their own gradient under `create_graph=True` would silently be none.
    """
    if not torch.is_grad_enabled():
        return gradients
    return [None if x is None else _RefuseSecondDerivative.apply(x, *inputs) for x in gradients]


def is_seen(tensors: Iterable[Tensor | None]) -> bool:
    """Whether something wants to see the operators of an eager call.

    That is a dispatch mode such as a FLOP counter, a transform of `torch.func`, or a subclass of Tensor. For
    anything else an `autograd.Function`, which leaves PyTorch's dispatcher out, serves for less.
    """
    if _len_dispatch_stack() or _peek_transforms() is not None:
        return True
    for x in tensors:  # noqa: SIM110  a generator would cost a call a tensor
        if x is not None and type(x) not in _PLAIN_TYPES:
            return True
    return False


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_len_dispatch_stack = torch._C._len_torch_dispatch_stack
_peek_transforms = torch._C._functorch.peek_interpreter_stack


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward will follow."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an empty tensor stands for it."""
    return like.new_empty(0) if x is None else x


def or_none(x: Tensor) -> Tensor | None:
    """Undoes `or_empty`."""
    return x if x.numel() else None
