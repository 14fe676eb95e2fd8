"""Launches of the kernels of small maps, added to a plan."""

import math

import torch

from ..arrays import Buffer
from ..attention.arguments import ForwardResults, Maps, PaddingRows, Saved
from ..forms import SMALL_MAP_ROWS
from ..lepe.arguments import LepeParts
from ..lib.exponential import LOG2_E
from ..lib.integers import inverse, next_power_of_2
from ..lib.maps import row_stride
from ..lib.precision import dot_precision
from ..plan import Plan
from ..problem import Gradients, Lepe, RoutedAttention
from ..routing.launch import Routing, launch_route, region_stride
from ..tiles import channel_block
from .arguments import Choices, RegionRows, SmallMapConfig, SmallMapGradients
from .backward import small_map_backward_kernel
from .forward import small_map_forward_kernel

# Most heads of a program. With fewer heads, more programs choose the same regions; with 8 the backward spills
# (compiled for sm_80).
_MOST_HEADS = 4
# Keys or queries of a step, by bytes of an element. With 64 keys a thread takes 148 registers at YOLO's P5
# instead of 116, so an SM holds half as many warps; with 16 queries dK/dV takes twice the instructions
# (`bra-bench report --arch sm_90`, with the step changed here). In float32 a step of 32 spills.
_STEP = {2: 32, 4: 16}
# Programs times BLOCK_P, up to which the programs choose the regions themselves. Programs of different heads
# repeat the choice of the same region; above this limit the repetition takes longer than a launch of
# `route_kernel`. At YOLO's P5 with 5 windows and batch 16 routing would be a third of the instructions
# (compiled for sm_90), and so of the time that `bra-bench report` predicts.
MOST_ROUTED = 2**14
# Elements in a step of the product of region queries and keys.
_ROUTER_STEP = 2048


def launch_small_map(
    plan: Plan,
    problem: RoutedAttention[Buffer],
    routing: Routing,
    lepe: Lepe[Buffer] | None,
    results: ForwardResults,
    trains: bool,
) -> None:
    """Adds the launch of routing, attention and LePE; with many programs, a launch of the routing before it.

    Args:
        plan: where to add them.
        problem: the attention; regions are not chosen yet.
        routing: region queries and keys, and where the choice goes.
        lepe: the convolution to add; None for none.
        results: where the results go; its `attention` is not None if there is LePE and a backward follows.
        trains: whether a backward follows, which reads the choice.
    """
    config = _config(problem)
    programs = _programs(problem, config)
    choices = Choices(routing.r_idx, routing.r_weight)
    rows: RegionRows | None = None
    if programs * config.BLOCK_P <= MOST_ROUTED:
        rows = RegionRows(routing.query, routing.key)
        choices = choices if trains else Choices(None, None)
        routing_dim = routing.query.shape[-1]
        config = config._replace(
            ROUTING_DIM=routing_dim,
            ROUTING_STRIDE=region_stride(routing.query),
            BLOCK_C=min(next_power_of_2(routing_dim), _ROUTER_STEP // config.BLOCK_P),
        )
    else:
        launch_route(plan, routing)
    plan.launch(
        small_map_forward_kernel,
        (programs,),
        (
            Maps.of(problem),
            rows,
            choices,
            PaddingRows.of(problem),
            LepeParts.of(lepe) if lepe else None,
            results,
        ),
        (
            *(problem.scale * LOG2_E, routing.scale),
            *_sizes(problem),
            config._replace(
                LEPE_STRIDE=row_stride(lepe.value) if lepe else 0,
                LEPE_KERNEL=lepe.kernel_size if lepe else 0,
            ),
        ),
        num_warps=config.HEADS,
        num_stages=1,
    )


def launch_small_map_gradient(
    plan: Plan,
    problem: RoutedAttention[Buffer],
    choices: Choices,
    saved: Saved,
    gradients: Gradients[Buffer],
    needs_padding: bool,
) -> Buffer | None:
    """Adds the launch that computes the gradients of queries, keys and values and writes them to `gradients`.

    Returns:
        With `needs_padding`, shares of the gradient of the padding's key and value, an output of the plan,
        `(N, num_heads, P, 1, qk_head_dim + v_head_dim)` float32; else None.
    """
    config = _config(problem)
    shares = None
    if needs_padding:
        width = problem.qk_head_dim + problem.v_head_dim
        shape = (problem.batch, problem.num_heads, problem.kv_grid.n_regions, 1, width)
        shares = plan.output(shape, torch.float32)
    plan.launch(
        small_map_backward_kernel,
        (2 * _programs(problem, config),),
        (
            *(Maps.of(problem), choices, PaddingRows.of(problem), saved),
            SmallMapGradients(gradients.query, gradients.key, gradients.value, shares),
        ),
        (
            *(problem.scale * LOG2_E, problem.scale),
            *_sizes(problem),
            config._replace(
                GRAD_QUERY_STRIDE=row_stride(gradients.query),
                GRAD_KEY_STRIDE=row_stride(gradients.key),
                GRAD_VALUE_STRIDE=row_stride(gradients.value),
            ),
        ),
        num_warps=config.HEADS,
        num_stages=1,
    )
    return shares


def _config(problem: RoutedAttention[Buffer]) -> SmallMapConfig:
    """The numbers that both kernels take; those of one kernel alone have their defaults."""
    return SmallMapConfig(
        NUM_HEADS=problem.num_heads,
        HEADS=math.gcd(problem.num_heads, _MOST_HEADS),
        QK_HEAD_DIM=problem.qk_head_dim,
        V_HEAD_DIM=problem.v_head_dim,
        QUERY_STRIDE=row_stride(problem.query),
        KEY_STRIDE=row_stride(problem.key),
        VALUE_STRIDE=row_stride(problem.value),
        BLOCK_OWN=SMALL_MAP_ROWS,
        BLOCK_STEP=_STEP[problem.query.dtype.itemsize],
        BLOCK_QK=channel_block(problem.qk_head_dim),
        BLOCK_V=channel_block(problem.v_head_dim),
        BLOCK_P=next_power_of_2(problem.query_grid.n_regions),
        BLOCK_K=next_power_of_2(problem.topk),
        IS_SOFT=problem.factor is not None,
        QUERY_IS_PADDED=problem.query_grid.is_padded,
        PRECISION=dot_precision(problem.query.dtype),
    )


def _programs(problem: RoutedAttention[Buffer], config: SmallMapConfig) -> int:
    return problem.batch * problem.query_grid.n_regions * (problem.num_heads // config.HEADS)


def _sizes(problem: RoutedAttention[Buffer]) -> tuple[int, ...]:
    """Sizes that both kernels take, in the order of their parameters."""
    grid, kv_grid = problem.query_grid, problem.kv_grid
    return (
        *(problem.topk, grid.n_regions, *grid.geometry),
        *(kv_grid.region_height, kv_grid.region_width, kv_grid.height, kv_grid.width),
        *(inverse(grid.region_tokens), inverse(grid.region_width)),
        *(inverse(kv_grid.region_tokens), inverse(kv_grid.region_width), inverse(grid.columns)),
    )
