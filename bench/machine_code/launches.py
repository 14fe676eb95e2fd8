"""The launches of a problem, from the package's own plans; tensors without data are enough to make them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bra_triton.bench.problems import Problem
from bra_triton.kernels import packed, tiles
from bra_triton.kernels.arrays import Buffer
from bra_triton.kernels.forms import ROUTED, use_form
from bra_triton.kernels.plan import _WORKSPACE, Launch, Plan
from bra_triton.kernels.pooling.launch import plan_pool, plan_pool_backward, pooling_inputs
from bra_triton.kernels.pooling.problem import MAX, WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Needs, PackedAttention
from bra_triton.kernels.tiles import Tile

# Names of the kernels that have entries in tables of tiles.
KERNEL_NAMES = {name: name for name in tiles.KERNELS} | {tiles.FORWARD: "attention_forward"}


def record_attention(problem: Problem, dtype: torch.dtype) -> list[Launch]:
    """Every launch of one forward and backward of an attention, including routing and pooling."""
    attention = problem.attention(lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))
    plans = (*_plans_of_pooling(problem, attention), *plan_pass(attention))
    return [launch for plan in plans for launch in plan.launches]


def launch_with(tile: Tile, kernel: str, problem: Problem, dtype: torch.dtype) -> Launch:
    """The launch of `kernel`, a key of `KERNEL_NAMES`, with that tile, in a problem's forward or backward."""
    # In the routed form: the tiles of masked and small-map attention are in no table.
    with tiles.use_tiles({kernel: tile}), use_form(ROUTED):
        launched = record_attention(problem, dtype)
    return next(launch for launch in launched if kernel_name(launch) == KERNEL_NAMES[kernel])


def plan_pass(attention: PackedAttention[Tensor]) -> tuple[Plan, Plan]:
    """The plans of a training step's forward and backward.

    The inputs of the backward are the attention's tensors, the output's gradient, the output (None with LePE)
    and the last result of the forward, which holds what it kept.
    """
    forward, qkv = packed.plan_attend(attention, trains=True), attention.qkv
    grad_out = qkv[..., : attention.dim].contiguous()
    kept = torch.empty(forward.kept_bytes, dtype=torch.uint8, device=qkv.device)
    # The backward reads the attention's share of the output. Without LePE, that is the whole output.
    out = grad_out if attention.lepe_weight is None else None
    needs = Needs(*(x is not None for x in attention.tensors))
    return forward, packed.plan_attend_backward(attention, (grad_out, out, kept), needs)


def _plans_of_pooling(problem: Problem, attention: PackedAttention[Tensor]) -> Iterator[Plan]:
    """If pooling makes the keys and values of the problem: the plans of the pooling and of its backward."""
    if problem.kv_per_win is None or problem.kv_pooling is None or attention.kv is None:
        return
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


def kernel_name(launch: Launch) -> str:
    """The kernel's name in reports."""
    return launch.name.removesuffix("_kernel")


def arguments_of(launch: Launch) -> dict[str, Any]:
    """A kernel's arguments by name, including the compile-time numbers of its `CONFIG` by their own names."""
    found = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    config = found.get("CONFIG")
    return found if config is None else {**found, **config._asdict()}


def variant(launch: Launch) -> str:
    """A text that two launches share if Triton compiles the same code for them."""
    kinds = [
        value if parameter.is_constexpr else _kind(value, not parameter.do_not_specialize)
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=True)
    ]
    return repr((launch.name, kinds, launch.options))


def _kind(value: Any, specialises: bool = True) -> Any:
    """The properties of a run-time argument that Triton compiles for; of a group, those of its members."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Buffer):
        return value.dtype, value.offset % 16 == 0
    return (value == 1, value % 16 == 0) if isinstance(value, int) and specialises else type(value)


def bytes_of_arguments(launch: Launch, scratch: bool = True) -> int:
    """Bytes of a launch's arrays, each array counted once: about the bytes that it has to move.

    With `scratch`, arrays in the workspace count, too; these have room for all partial sums that may occur.
    """
    members = (x for each in launch.pointers for x in (each if isinstance(each, tuple) else (each,)))
    arrays = {x for x in members if x is not None and (scratch or x.source != _WORKSPACE)}
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
