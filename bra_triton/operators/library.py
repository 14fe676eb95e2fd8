"""Registers operators in PyTorch's dispatcher, and defines what all operators of the package share."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from ..export import is_eager

_library = torch.library.Library("bra_triton", "FRAGMENT")


def operator(name: str, schema: str, has_gradient: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: registers a function that changes no argument as the operator `bra_triton::<name>`.

    `torch.library.custom_op` would do the same, but in PyTorch 2.11 Dynamo's hook then runs for every Python
    function that is called inside the operator. Timed by hand on Python 3.12, a launch that took 24 us of CPU
    time took 106 us inside a `custom_op`. Inside an operator of this decorator, timed on a slower machine of
    the same kind, a launch of 33 us took 57 us.

    Args:
        name: name of the operator.
        schema: arguments and results, as in PyTorch's `native_functions.yaml`.
        has_gradient: whether an autograd formula will be registered. If not, autograd records nothing when
            the operator is called, and the caller must provide the gradients.
    """

    def make(function: Callable[..., Any]) -> Any:
        _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)

        @wraps(function)
        def run(*arguments: Any) -> Any:
            refuse_tangents(arguments)
            return function(*arguments)

        _library.impl(name, run, "CompositeExplicitAutograd")
        if not has_gradient:
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        made = getattr(torch.ops.bra_triton, name).default
        made.__doc__ = function.__doc__
        torch.library.register_vmap(made, by_sample(made))
        return made

    return make


def gradient_operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """As `operator`, for a function that computes gradients; differentiating these raises RuntimeError."""

    def make(function: Callable[..., Any]) -> Any:
        made = operator(name, schema)(function)
        torch.library.register_autograd(made, _refuse)
        return made

    return make


def fake_of(made: Any) -> Callable[[Callable[..., Any]], None]:
    """Decorator: registers a function that makes the operator's results without values, for compilers."""

    def register(function: Callable[..., Any]) -> None:
        @wraps(function)
        def run(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0:  # under a compiler, tensors do not show their tangents
                raise RuntimeError(_NO_FORWARD_MODE)
            return function(*arguments)

        torch.library.register_fake(made)(run)

    return register


def flops_of(made: Any) -> Callable[[Callable[..., int]], Any]:
    """Decorator: registers how PyTorch's `FlopCounterMode` counts the operator, from its arguments' shapes.

    A product and an addition are two operations, as everywhere in that counter.
    """
    logger = logging.getLogger("torch.utils.flop_counter")
    was_disabled, logger.disabled = logger.disabled, True  # the import logs a warning if there is no Triton
    from torch.utils.flop_counter import register_flop_formula

    logger.disabled = was_disabled
    return register_flop_formula(made.overloadpacket)


def differentiable(made: Any, gradients: Callable[..., Any], save: Callable[..., None]) -> Any:
    """Gives an operator a gradient, and returns a function that calls it.

    An autograd formula that is registered by `torch.library.register_autograd` does not work under nested
    transforms of `torch.func`, such as gradients for every sample. So the returned function uses an
    `autograd.Function` under transforms.

    Args:
        made: the operator.
        gradients: the backward, as `torch.library.register_autograd` takes it.
        save: the `setup_context` of `torch.library.register_autograd`.
    """
    torch.library.register_autograd(made, gradients, setup_context=save)

    class Transformed(Transformable):
        forward = staticmethod(made)
        setup_context = staticmethod(save)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            with torch.no_grad():
                found = gradients(ctx, *grads)
            return tuple(refusing_second_derivative(found, *grads, *ctx.saved_tensors))

    def call(*arguments: Any) -> Any:
        if not is_eager():
            return made(*arguments)
        refuse_tangents(arguments)
        return made(*arguments) if _peek_transforms() is None else Transformed.apply(*arguments)

    return call


class Transformable(torch.autograd.Function):
    """Base of the functions for transforms of `torch.func`: `vmap` calls them once for each sample.

    Forward mode raises RuntimeError. Not for `torch.compile`, which does not accept a function that has a
    rule for forward mode.
    """

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        """See `torch.autograd.Function.vmap`."""
        return by_sample(cls.apply)(info, in_dims, *arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raises RuntimeError: there is no forward mode."""
        raise RuntimeError(_NO_FORWARD_MODE)


def by_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule by which `torch.func.vmap` calls a function of tensors once for every sample."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        if not info.batch_size:
            raise RuntimeError(
                "the fused backends need at least one sample under torch.func.vmap, got an empty batch"
            )
        results = [
            function(*(_sample(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        stacked = tree_map(lambda *samples: torch.stack(samples), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    return rule


def _sample(x: Any, dim: Any, index: int) -> Any:
    """One sample of an argument; of a list, for which `dim` is a list, too, a list of samples."""
    if isinstance(dim, list | tuple):
        return [_sample(each, d, index) for each, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, index)


def refuse_tangents(arguments: Iterable[Any]) -> None:
    """Raises RuntimeError if a tensor has a tangent, which an operator would drop."""
    if forward_ad._current_level >= 0:
        for x in tree_leaves(arguments):
            if isinstance(x, Tensor) and _has_tangent(x):
                raise RuntimeError(_NO_FORWARD_MODE)


def _has_tangent(x: Tensor) -> bool:
    """Whether `x` has a tangent, or a tensor inside `x` that transforms of `torch.func` have wrapped."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(x) and forward_ad.unpack_dual(x).tangent is not None:
        return True
    return functorch.is_functorch_wrapped_tensor(x) and _has_tangent(functorch.get_unwrapped(x))


_NO_FORWARD_MODE = (
    "the fused backends have no forward-mode differentiation; use backend='reference', which supports it"
)


def _refuse(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "the fused backends have no second derivatives; use backend='reference', which supports them"
    )


class _RefuseSecondDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *others: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Saves nothing."""

    backward = staticmethod(_refuse)


def refusing_second_derivative(
    gradients: Sequence[Tensor | None], *inputs: Tensor | None
) -> Sequence[Tensor | None]:
    """Changes the gradients that an `autograd.Function` returns, so that differentiating them raises.

    The gradients are computed without a graph. Without this change, PyTorch would silently leave out their
    own gradient under `create_graph=True`.
    """
    if not torch.is_grad_enabled():
        return gradients
    return [None if x is None else _RefuseSecondDerivative.apply(x, *inputs) for x in gradients]


def refusing_batches(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Decorator of a backward: its error is a clear one if the gradient is a batch of gradients.

    PyTorch makes such a gradient for `is_grads_batched=True`, by an older form of `vmap`. Neither the kernels
    nor the functions of the torch backend take it.
    """

    @wraps(backward)
    def run(ctx: Any, grad_out: Tensor) -> Any:
        try:
            return backward(ctx, grad_out)
        except RuntimeError:
            if not torch._C._functorch.is_legacy_batchedtensor(grad_out):
                raise
        raise RuntimeError(
            "the fused backends take no batch of gradients (is_grads_batched=True, vectorize=True); use "
            "torch.func.vmap or torch.func.jacrev, or backend='reference', which supports it"
        )

    return run


class Witness:
    """Tells whether the output of a forward, which the backward reads, was changed in place in between.

    Callers may change it. PyTorch would then raise an error if the output itself had been saved, and a copy
    would take as much memory as a map. So `out.data` is saved, which autograd does not watch, and a backward
    that finds the output changed computes it again.
    """

    def __init__(self, out: Tensor) -> None:
        self._version = out._version
        self._shadow = out.detach()
        self._shadow.data = out.new_empty(0)  # keeps the count of changes, which is shared with `out`

    @property
    def sees_change(self) -> bool:
        """Whether the output was changed."""
        return self._shadow._version != self._version


def is_seen(tensors: Iterable[Tensor | None]) -> bool:
    """Whether an eager call must use the operators, because something needs to see them.

    That may be a dispatch mode such as a FLOP counter, a transform of `torch.func`, a level of forward-mode
    differentiation, or a subclass of Tensor. Otherwise an `autograd.Function` that does not use PyTorch's
    dispatcher costs less.
    """
    if _len_dispatch_stack() or _peek_transforms() is not None or forward_ad._current_level >= 0:
        return True
    for x in tensors:  # noqa: SIM110  a generator would cost one more call for each tensor
        if x is not None and type(x) not in _PLAIN_TYPES:
            return True
    return False


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_len_dispatch_stack = torch._C._len_torch_dispatch_stack
_peek_transforms = torch._C._functorch.peek_interpreter_stack


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward will follow: gradients are enabled, and a tensor requires one."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False
