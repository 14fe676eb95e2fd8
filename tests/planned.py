"""Runs on tensors the launches that a function adds to a plan."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bra_triton.kernels.arrays import Buffer
from bra_triton.kernels.attention.launch import launch_finish
from bra_triton.kernels.forms import form_of
from bra_triton.kernels.lepe.arguments import LepeSums
from bra_triton.kernels.lepe.launch import launch_lepe_gradient
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Lepe, RoutedAttention
from bra_triton.kernels.routing import launch as routing_launch
from bra_triton.kernels.routing import lists


class OpenPlan(Plan):
    """A plan that returns all its arrays as outputs, also those that belong in the workspace."""

    scratch = Plan.output


def run(add: Callable[..., Any], *arguments: Any) -> Any:
    """Runs the launches that `add(plan, *arguments)` adds to a plan.

    `add` gets a buffer in the place of each tensor in `arguments`. A launch that writes to such a buffer
    changes the tensor in place.

    Returns:
        The result of `add`, with tensors in the place of buffers.
    """
    tensors = _tensors_in(arguments)
    plan = OpenPlan(tensors, tensors[0].device)
    inputs = iter(plan.given)
    result = add(plan, *_replaced(arguments, Tensor, lambda _: next(inputs)))
    with poisoned():
        arrays = [*tensors, *plan.run(*tensors)]
    return _replaced(result, Buffer, lambda buffer: _view(arrays[buffer.source], buffer))


def lists_of(problem: RoutedAttention[Tensor]) -> tuple[lists.KeyLists, lists.QueryLists]:
    """The lists of a problem that the attention kernels read."""

    def add(plan: Plan, problem: RoutedAttention[Buffer]) -> tuple[lists.KeyLists, lists.QueryLists]:
        keys = lists.take_key_lists(problem, form_of(problem), plan.scratch)
        lists.launch_key_lists(plan, problem, keys)
        return keys, lists.launch_query_lists(plan, problem, keys)

    return run(add, problem)


def lepe_gradient(
    plan: Plan,
    grad_out: Buffer,
    grad_value: Buffer,
    lepe: Lepe[Buffer],
    sums: LepeSums,
    adds_to_grad: bool = False,
) -> LepeSums:
    """Adds LePE's backward and the launch that sums its shares, without an attention."""
    shares = launch_lepe_gradient(plan, grad_out, grad_value, lepe, sums, adds_to_grad)
    launch_finish(plan, None, shares)
    return sums


@contextmanager
def poisoned() -> Iterator[None]:
    """Context in which new tensors are filled with NaN or the largest integer.

    Tests then see elements that no kernel has written.
    """
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # training with Ultralytics switches it off
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def routed_in_steps() -> Iterator[None]:
    """Context in which `route_kernel` processes key regions in steps of 16; outside, steps are of 256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_launch, "_ROUTE_OPERAND", 16)
        yield


@contextmanager
def routed_apart() -> Iterator[None]:
    """Context in which `route_kernel` has one program for each query region.

    Outside, it has so many programs only if `topk` exceeds 256.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_launch, "_ROUTE_OPERAND", 0)
        patch.setattr(routing_launch, "_ROUTE_KEPT", 0)
        yield


def _tensors_in(arguments: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    _replaced(arguments, Tensor, note)
    return found


def _view(holder: Tensor, buffer: Buffer) -> Tensor:
    first = holder.storage_offset() + buffer.offset // buffer.dtype.itemsize
    return holder.as_strided(buffer.shape, buffer.strides, first)


def _replaced(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with `function` applied to every member of a kind, also in tuples, lists and dataclasses."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        members = [_replaced(member, kind, function) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if is_dataclass(value):
        members = {f.name: _replaced(getattr(value, f.name), kind, function) for f in fields(value)}
        return replace(value, **members) if members else value
    return value
