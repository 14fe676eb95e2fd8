"""The computations of the Triton backend, each of which runs a cached plan.

`bra_triton.backend.kernels.FusedKernels` describes the arguments and results of the functions.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import overrides, tiles
from .bounded import Bounded
from .grid import RegionGrid
from .lib.precision import float32_setting
from .packed import kept_bytes, plan_attend, plan_attend_backward
from .padding import padding_gradient
from .plan import Plan
from .pooling.launch import plan_pool, plan_pool_backward, pooling_inputs
from .pooling.problem import PoolingGradients, RegionPooling
from .problem import Gradients, Needs, PackedAttention, PackedGradients, RoutedAttention
from .routed import plan_attend_routed, plan_attend_routed_backward
from .routing.plans import plan_region_means, plan_route, plan_route_backward

__all__ = [
    "attend",
    "attend_backward",
    "attend_routed",
    "attend_routed_backward",
    "pool",
    "pool_backward",
    "region_means",
    "route",
    "route_backward",
    "saved_like",
]

_plans: dict[Hashable, Plan] = Bounded()
# Part of the keys of the plans in `PackedAttention.plans`: a new number makes all of these plans stale.
_generation = [0]


def forget_plans() -> None:
    """Drops all plans, so that every call is planned again."""
    _plans.clear()
    _generation[0] += 1


tiles.when_forgotten.append(forget_plans)


def _plan_of(make: Callable[..., Plan], key: tuple[Hashable, ...], *arguments: Any) -> Plan:
    """The plan `make(*arguments)`, made once for each key.

    Args:
        make: makes the plan.
        key: everything that the plan depends on, except PyTorch's precision setting for float32 products and
            `overrides.in_force()`, which are added here.
        arguments: arguments of `make`.
    """
    return _found(_plans, (make, *key, float32_setting(), overrides.in_force()), make, *arguments)


def _packed_plan(
    problem: PackedAttention[Tensor], make: Callable[..., Plan], key: tuple[Hashable, ...], *arguments: Any
) -> Plan:
    """Like `_plan_of`, for a packed attention, which may have a dictionary of its own for its plans.

    All plans in that dictionary are for the same settings, shapes, dtype and device, so its keys are shorter.
    """
    if problem.plans is None:
        return _plan_of(make, (_key(problem), *key), problem, *arguments)
    full_key = (make, key, float32_setting(), overrides.in_force(), _generation[0])
    plan: Plan | None = problem.plans.get(full_key)
    return plan or _found(problem.plans, full_key, make, problem, *arguments)


def _found(plans: dict[Hashable, Plan], key: Hashable, make: Callable[..., Plan], *arguments: Any) -> Plan:
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = make(*arguments)
    return plan


def attend(problem: PackedAttention[Tensor], trains: bool) -> tuple[Tensor, list[Tensor]]:
    """See `FusedKernels`."""
    plan = _packed_plan(problem, plan_attend, (trains,), trains)
    out, *saved = plan.run(*problem.tensors)
    return out, saved


def saved_like(problem: PackedAttention[Tensor]) -> list[Tensor]:
    """See `FusedKernels`."""
    return [problem.qkv.new_empty(kept_bytes(problem), dtype=torch.uint8)]


def attend_backward(
    grad_out: Tensor,
    problem: PackedAttention[Tensor],
    out: Tensor | None,
    saved: Sequence[Tensor],
    needs: Needs,
) -> PackedGradients:
    """See `FusedKernels`."""
    others = (grad_out, out, *saved)
    plan = _packed_plan(problem, plan_attend_backward, (needs,), others, needs)
    grad_qkv, *rest = plan.run(*problem.tensors, *others)
    outputs = iter(rest)
    grad_kv, grad_means, grad_weight, grad_bias, fill, shares = (
        next(outputs) if wanted else None for wanted in plan.wanted
    )
    grad_padding = None
    if problem.padding is not None and needs.padding:
        grad_padding = _padding_gradient(problem, shares, fill, grad_means)
    return PackedGradients(
        grad_qkv,
        grad_kv if needs.kv else None,
        grad_padding,
        grad_means if needs.means else None,
        grad_weight,
        grad_bias,
    )


def _padding_gradient(
    problem: PackedAttention[Tensor], shares: Tensor | None, fill: Tensor | None, grad_means: Tensor | None
) -> Tensor:
    of_keys_values = None
    if shares is not None:
        qk_head_dim = problem.settings.qk_dim // problem.settings.num_heads
        # Keys and values are summed separately: slices of one common sum would not be contiguous, and
        # flattening them would copy them.
        of_keys, of_values = (
            x.sum((0, 2, 3)) for x in (shares[..., :qk_head_dim], shares[..., qk_head_dim:])
        )
        of_keys_values = of_keys.flatten(), of_values.flatten()
    return padding_gradient(problem, of_keys_values, fill, grad_means)


def attend_routed(problem: RoutedAttention[Tensor]) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`; the second result is the base-2 logarithm of the softmax's denominator."""
    tensors = problem.tensors
    out, lse = _plan_of(plan_attend_routed, _routed_key(problem), problem).run(*tensors)
    return out, lse


def attend_routed_backward(
    grad_out: Tensor, problem: RoutedAttention[Tensor], out: Tensor, lse: Tensor
) -> Gradients[Tensor]:
    """See `FusedKernels`."""
    plan = _plan_of(plan_attend_routed_backward, _routed_key(problem), problem, (grad_out, out, lse))
    return Gradients(*plan.run(*problem.tensors, grad_out, out, lse))


def region_means(qkv: Tensor, padding: Tensor | None, grid: RegionGrid, channels: int) -> Tensor:
    """See `FusedKernels`."""
    tensors = (qkv, padding)
    plan = _plan_of(plan_region_means, (grid, channels, _layouts(tensors)), tensors, grid, channels)
    return plan.run(*tensors)[0]


def route(query: Tensor, key: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`."""
    tensors = (query, key)
    r_weight, r_idx = _plan_of(plan_route, (topk, scale, _layouts(tensors)), tensors, topk, scale).run(
        *tensors
    )
    return r_weight, r_idx


def route_backward(
    grad_weight: Tensor, r_weight: Tensor, r_idx: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See `FusedKernels`."""
    tensors = (grad_weight, r_weight, r_idx, query, key)
    plan = _plan_of(plan_route_backward, (scale, _layouts(tensors)), tensors, scale)
    grad_query, grad_key = plan.run(*tensors)
    return grad_query, grad_key


def pool(
    x: Tensor,
    fill: Tensor | None,
    pooling: RegionPooling[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `FusedKernels`."""
    tensors = pooling_inputs(x, fill, pooling, weight, bias)
    plan = _plan_of(plan_pool, (pooling.mode, pooling.grid, _layouts(tensors)), tensors, pooling)
    pooled, *rest = plan.run(*tensors)
    return pooled, rest[0] if rest else None


def pool_backward(
    grad_pooled: Tensor,
    x: Tensor,
    fill: Tensor | None,
    argmax: Tensor | None,
    pooling: RegionPooling[Tensor],
    weight: Tensor | None,
    grad_x: Tensor,
) -> PoolingGradients:
    """See `FusedKernels`."""
    tensors = (*pooling_inputs(x, fill, pooling, weight), grad_pooled, argmax, grad_x)
    plan = _plan_of(plan_pool_backward, (pooling.mode, pooling.grid, _layouts(tensors)), tensors, pooling)
    sums = iter([shares.sum(0) for shares in plan.run(*tensors)])
    grad_fill = next(sums) if pooling.grid.is_padded else None
    if weight is None:
        return PoolingGradients(grad_fill)
    grad_bias = grad_pooled.sum((0, 1, 2), dtype=torch.float32)
    return PoolingGradients(grad_fill, next(sums).t().reshape(weight.shape), grad_bias)


def _routed_key(problem: RoutedAttention[Tensor]) -> tuple[Hashable, ...]:
    """Everything that a plan depends on. It does not depend on the values of the tensors."""
    return (
        problem.query_grid,
        problem.kv_grid,
        problem.num_heads,
        problem.scale,
        _layouts(problem.tensors),
    )


def _layouts(tensors: Iterable[Tensor | None]) -> tuple[Hashable, ...]:
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)


def _key(problem: PackedAttention[Tensor]) -> tuple[Hashable, ...]:
    """Everything that a plan depends on. It does not depend on the values of the tensors.

    The key has no strides, because the tensors are contiguous, and only one dtype: `means` are float32, and
    the other tensors have the dtype of `qkv`.
    """
    qkv, kv = problem.qkv, problem.kv
    return (
        problem.settings,
        qkv.shape,
        qkv.dtype,
        qkv.device,
        None if kv is None else kv.shape,
        problem.padding is None,
        problem.means is None,
        None if problem.lepe_weight is None else problem.lepe_weight.shape,
        problem.lepe_bias is None,
    )
