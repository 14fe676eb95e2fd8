"""How an operator is entered in PyTorch's dispatcher, and what the operators have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("bra_triton", "FRAGMENT")


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: makes `bra_triton::<name>` of a function that changes no argument.

    `torch.library.custom_op` would do the same, but PyTorch 2.11 runs what is inside with Dynamo's hook on
    every call of a Python function. Timed by hand on Python 3.12, a launch that took 24 us of the CPU's time
    took 106 us as such an operator; on a slower machine of the kind 33 us became 57 us as this one.

    Args:
        name: of the operator.
        schema: arguments and results, as in PyTorch's `native_functions.yaml`.
    """

    def make(function: Callable[..., Any]) -> Any:
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
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


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may leave PyTorch's dispatcher out: then an `autograd.Function` serves for less.

    Not where something wants to see operators: a compiler, a dispatch mode such as a FLOP counter, a
    transform of `torch.func`, or a subclass of Tensor.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(x is None or type(x) in _PLAIN_TYPES for x in tensors)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward will follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside an operator the types are decided; autocast would round float32 statistics to half precision."""
    kind = x.device.type
    # Turning off what is not on costs 6 us a time, four times a training step.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an empty tensor stands for it."""
    return like.new_empty(0) if x is None else x


def or_none(x: Tensor) -> Tensor | None:
    """Undoes `or_empty`."""
    return x if x.numel() else None
