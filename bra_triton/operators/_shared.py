"""What the operators have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("bra_triton", "FRAGMENT")


def operator(function: Callable[..., Any]) -> Any:
    """Decorator: makes `bra_triton::<the function's name>` of a function that changes no argument.

    `torch.library.custom_op` would do the same, but PyTorch 2.11 runs what is inside with Dynamo's hook on
    every call of a Python function. Timed by hand on Python 3.12, a launch that took 24 us of the CPU's time
    took 106 us as such an operator; on a slower machine of the kind 33 us became 57 us as this one.
    """
    name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, function, "CompositeExplicitAutograd")
    return update_wrapper(
        getattr(torch.ops.bra_triton, name).default, function, assigned=("__doc__",), updated=()
    )


def gradient_operator(function: Callable[..., Any]) -> Any:
    """`operator` for a function that computes gradients, and has none itself: differentiating it raises."""
    made = operator(function)
    torch.library.register_autograd(made, _refuse)
    return made


def _refuse(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("the fused backends have no second derivatives; backend='reference' has")


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside an operator the types are decided; autocast would round float32 statistics to half precision."""
    kind = x.device.type
    # Turning off what is not on costs 6 us a time, four times a training step.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Type of softmax statistics, means and weights for maps like `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an empty tensor stands for it."""
    return like.new_empty(0) if x is None else x
