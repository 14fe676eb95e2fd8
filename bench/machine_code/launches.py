"""What the package launches on a GPU: its own plans, made for tensors without data, ready to be compiled."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bra_triton.bench.machine_code.static_analysis import KernelSpecimen
from bra_triton.bench.problems import Problem
from bra_triton.kernels import packed
from bra_triton.kernels.arrays import Buffer
from bra_triton.kernels.plan import Launch as PlannedLaunch
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.pooling.launch import plan_pool, plan_pool_backward, pooling_inputs
from bra_triton.kernels.pooling.problem import MAX, WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Needs, PackedAttention

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    specimen: KernelSpecimen  # what the compiler is given
    grid: tuple[int, ...]  # programs along each axis
    arguments: Mapping[str, Any]  # by name, compile-time ones included

    @property
    def programs(self) -> int:
        """Thread blocks of the launch."""
        return math.prod(self.grid)

    @property
    def is_masked(self) -> bool:
        """Whether an attention kernel gives every query all keys, under a mask."""
        return self.arguments.get("marks") is not None

    @property
    def bytes_of_arguments(self) -> int:
        """What its arrays hold, each counted once: about what the launch has to move."""
        arrays = {x for _, x in _buffers(self.arguments)}
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def launches_of(plan: Plan) -> list[Launch]:
    """What a plan launches, in order.

    Raises:
        TypeError: under `TRITON_INTERPRET=1`, where kernels are not compiled.
    """
    return [_launch(launch) for launch in plan.launches]


def record_attention(problem: Problem, dtype: torch.dtype) -> list[Launch]:
    """Every launch of one forward and backward of an attention, routing and pooling included.

    Raises:
        TypeError: under `TRITON_INTERPRET=1`, where kernels are not compiled.
    """
    attention = problem.attention(lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))
    pooling = () if problem.kv_pooling is None else _plans_of_pooling(problem, attention)
    return [launch for plan in (*pooling, *plan_pass(attention)) for launch in launches_of(plan)]


def plan_pass(attention: PackedAttention[Tensor]) -> tuple[Plan, Plan]:
    """The plans of a training step's forward and backward.

    The backward takes the attention's tensors, the output's gradient, the output (None with LePE) and what
    the forward has returned last.
    """
    forward, qkv = packed.plan_attend(attention, trains=True), attention.qkv
    grad_out = qkv[..., : attention.dim].contiguous()
    kept = torch.empty(forward.kept_bytes, dtype=torch.uint8, device=qkv.device)
    # Without LePE the attention's share of the output, which the backward reads, is the output.
    out = grad_out if attention.lepe_weight is None else None
    needs = Needs(*(x is not None for x in attention.tensors))
    return forward, packed.plan_attend_backward(attention, (grad_out, out, kept), needs)


def _plans_of_pooling(problem: Problem, attention: PackedAttention[Tensor]) -> Iterator[Plan]:
    """Keys and values of the regions, and the gradients of what they are made of."""
    assert problem.kv_per_win is not None
    assert problem.kv_pooling is not None
    assert attention.kv is not None
    grid, pooled = problem.grid, attention.kv
    kv = attention.qkv[..., problem.qk_dim :]
    rows, columns = (torch.empty(problem.kv_per_win, 2, dtype=torch.int32, device="meta") for _ in range(2))
    pooling = RegionPooling(rows, columns, problem.kv_pooling, grid)
    fill = None if attention.padding is None else attention.padding[problem.qk_dim :]
    weight = bias = argmax = None
    if pooling.mode == WEIGHTED:
        sides = (side // problem.kv_per_win for side in (grid.region_height, grid.region_width))
        weight, bias = kv.new_empty(kv.shape[-1], *sides), kv.new_empty(kv.shape[-1])
    if pooling.mode == MAX:
        argmax = torch.empty_like(pooled, dtype=torch.int32)
    inputs = pooling_inputs(kv, fill, pooling, weight, bias)
    yield plan_pool(inputs, pooling)
    yield plan_pool_backward((*inputs, pooled, argmax, kv), pooling)


def _launch(launch: PlannedLaunch) -> Launch:
    kernel = launch.kernel
    if not hasattr(kernel, "params"):
        raise TypeError(f"{launch.name} is not compiled; is TRITON_INTERPRET set?")
    bound = dict(zip(kernel.arg_names, launch.arguments, strict=True))
    constant = {p.name for p in kernel.params if p.is_constexpr or bound[p.name] is None}
    constexprs = {name: bound[name] for name in bound if name in constant}
    signature = {name: _type(value) for name, value in bound.items() if name not in constant}
    # Slices need not start at multiples of 16 bytes.
    divisible = frozenset(name for name, x in _buffers(bound) if x.offset % 16 == 0)
    name = launch.name.removesuffix("_kernel")
    # Where a launch does not say how many warps and stages, the specimen's defaults are Triton's.
    specimen = KernelSpecimen(name, kernel, signature, constexprs, divisible, **launch.options)
    return Launch(specimen, launch.grid, bound)


def _buffers(bound: Mapping[str, Any]) -> Iterator[tuple[str, Buffer]]:
    """Arrays among arguments, those of a group named as `maps.query`."""
    for name, value in bound.items():
        if isinstance(value, tuple):
            members: dict[str, Any] = value._asdict()  # type: ignore[attr-defined]
            yield from _buffers({f"{name}.{inner}": x for inner, x in members.items()})
        elif isinstance(value, Buffer):
            yield name, value


def _type(value: Any) -> Any:
    """Triton's type of a run-time argument, of a group the group of its members' types."""
    if isinstance(value, tuple):
        return type(value)(*map(_type, value))
    if isinstance(value, Buffer):
        return _TYPES[value.dtype]
    return "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"
