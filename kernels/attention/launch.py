"""Launches of the attention kernels, added to a plan."""

from dataclasses import dataclass

import torch

from .. import tiles
from ..arrays import Buffer
from ..forms import MASKED, WHOLE
from ..grid import RegionGrid
from ..lepe.arguments import LepeParts, LepeSums, LepeSumsConfig
from ..lepe.launch import LepeShares, launch_lepe
from ..lib.exponential import LOG2_E
from ..lib.integers import cdiv, next_power_of_2
from ..lib.maps import image_tokens, row_stride
from ..lib.precision import dot_precision
from ..plan import Plan
from ..problem import Gradients, Lepe, RoutedAttention
from ..routing.arguments import Marks
from ..routing.lists import KeyLists, QueryLists
from .arguments import (
    AttentionConfig,
    ForwardResults,
    KeyValueResults,
    Maps,
    PaddingRows,
    Pieces,
    QueryResults,
    Saved,
)
from .finish import finish_gradients_kernel
from .forward import attention_forward_kernel
from .key_value_gradient import key_value_gradient_kernel
from .query_gradient import query_gradient_kernel

# Most tokens in a step at the end of a list. A step of 128 keys at the end of 400 keys would waste 112 rows.
# Narrow steps also take fewer registers: with them the widest tiles do not spill.
TAIL_STEP = 32
# Fewest warps of a program that sums LePE's shares: in one warp its tile spills (heads of 20, sm_90).
_LEPE_SUM_WARPS = 4


@dataclass(frozen=True)
class Attention:
    """An attention whose launches are to be planned.

    Attributes:
        problem: the maps and the regions.
        form: form of the attention, one of those in `forms`.
        lists: lists and marks that the kernels that own queries read.
    """

    problem: RoutedAttention[Buffer]
    form: str
    lists: KeyLists

    def owned(self, grid: RegionGrid) -> tuple[int, int]:
        """Number of regions whose tokens programs own, and tokens of each; if masked, one with all tokens."""
        if self.form == MASKED:
            return 1, grid.n_regions * grid.region_tokens
        return grid.n_regions, grid.region_tokens

    def programs(self, grid: RegionGrid, own: int) -> int:
        """Number of programs of a kernel whose programs own `own` tokens each."""
        rows, region_tokens = self.owned(grid)
        return self.problem.batch * rows * cdiv(region_tokens, own) * self.problem.num_heads

    def tile(self, kernel: str, device: torch.device, is_weighted: bool) -> tiles.Tile:
        """The tile of `kernel`, one of `tiles.KERNELS`."""
        if self.form == MASKED:
            return tiles.MASKED_TILES[kernel]
        problem = self.problem
        grid = problem.kv_grid if kernel == tiles.KEY_VALUE_GRADIENT else problem.query_grid
        heads = (problem.qk_head_dim, problem.v_head_dim)
        form = tiles.tile_form(heads, problem.padding is not None, problem.n_graphs, is_weighted)
        return tiles.choose(kernel, problem.query.dtype, max(heads), grid.region_tokens, device, form)

    def config(self, tile: tiles.Tile, block_m: int, block_n: int) -> AttentionConfig:
        """Compile-time numbers that the kernels share, for tiles of `block_m` queries and `block_n` keys."""
        problem, marks = self.problem, self.lists.marks
        return AttentionConfig(
            NUM_HEADS=problem.num_heads,
            N_GRAPHS=0 if self.form == WHOLE else problem.n_graphs,
            QK_HEAD_DIM=problem.qk_head_dim,
            V_HEAD_DIM=problem.v_head_dim,
            QUERY_STRIDE=row_stride(problem.query),
            KEY_STRIDE=row_stride(problem.key),
            VALUE_STRIDE=row_stride(problem.value),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_TAIL=min(tile.step, TAIL_STEP),
            BLOCK_QK=tiles.channel_block(problem.qk_head_dim),
            BLOCK_V=tiles.channel_block(problem.v_head_dim),
            BLOCK_MARKS=16 if marks is None else marks.key_marks.shape[-1],
            PRECISION=dot_precision(problem.query.dtype),
            QUERY_IS_PADDED=problem.query_grid.is_padded,
        )

    @property
    def leading_arguments(self) -> tuple[Maps, PaddingRows | None, Marks | None]:
        """The groups of pointers that all attention kernels take."""
        return Maps.of(self.problem), PaddingRows.of(self.problem), self.lists.marks

    @property
    def query_side_sizes(self) -> tuple[int, ...]:
        """Sizes that the kernels that own queries take, in the order of their parameters."""
        problem = self.problem
        return (
            image_tokens(problem.query),
            image_tokens(problem.key),
            problem.query_grid.n_regions,
            self.owned(problem.query_grid)[1],
            self.owned(problem.kv_grid)[1] * (1 if self.form == MASKED else problem.topk),
        )


def launch_attention(
    plan: Plan, attention: Attention, lepe: Lepe[Buffer] | None, results: ForwardResults
) -> None:
    """Adds the launch of the attention's forward and of LePE: one for both, or one for each.

    Args:
        plan: where to add them.
        attention: the attention; its maps are float32, float16 or bfloat16.
        lepe: the convolution to add; None for none.
        results: where the results go; its `attention` is not None if there is LePE and a backward follows.
    """
    problem = attention.problem
    tile = attention.tile(tiles.FORWARD, plan.device, problem.factor is not None)
    out = results.out
    if lepe is not None and not tile.fuses_lepe:
        # LePE has its own launch, which reads the attention's output from the array that the backward reads
        # or, without a backward, from the workspace.
        alone = results.attention or plan.scratch(out.shape, out.dtype)
        results, fused = ForwardResults(alone, None, results.lse), None
    else:
        alone, fused = out, lepe
    grid = problem.query_grid
    bottom, right = grid.padding
    maps, padding, marks = attention.leading_arguments
    plan.launch(
        attention_forward_kernel,
        (attention.programs(grid, tile.own),),
        (
            *(maps, attention.lists.arguments, padding, marks),
            *(None if fused is None else LepeParts.of(fused), results),
        ),
        (
            problem.scale * LOG2_E,
            *attention.query_side_sizes,
            *(grid.height, grid.width, grid.height + bottom, grid.width + right),
            attention.config(tile, tile.own, tile.step)._replace(
                EXP_SHARE=tile.exp_share,
                LEPE_STRIDE=0 if fused is None else row_stride(fused.value),
                LEPE_KERNEL=0 if fused is None else fused.kernel_size,
            ),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if lepe is not None and fused is None:
        launch_lepe(plan, alone, lepe, out)


def launch_query_gradient(
    plan: Plan, attention: Attention, saved: Saved, grad_query: Buffer, needs_factor: bool = False
) -> tuple[Buffer, Buffer | None]:
    """Adds the launch that computes dQ and writes it to `grad_query`.

    Returns:
        The statistics (lse and delta) that dK/dV reads; and, with `needs_factor`, shares of the factor's
        gradient, `(N, num_heads, P, tiles, topk)` float32, else None.
    """
    problem, grid = attention.problem, attention.problem.query_grid
    tile = attention.tile(tiles.QUERY_GRADIENT, plan.device, needs_factor or problem.factor is not None)
    statistics = plan.scratch((*saved.lse.shape, 2), torch.float32)
    shares = None
    if needs_factor:
        n_tiles = cdiv(grid.region_tokens, tile.own)
        shape = (problem.batch, problem.num_heads, grid.n_regions, n_tiles, problem.topk)
        shares = plan.scratch(shape, torch.float32)
    maps, padding, marks = attention.leading_arguments
    plan.launch(
        query_gradient_kernel,
        (attention.programs(grid, tile.own),),
        (
            *(maps, attention.lists.arguments, padding, marks, saved),
            QueryResults(grad_query, statistics, shares),
        ),
        (
            *(problem.scale * LOG2_E, problem.scale),
            *attention.query_side_sizes,
            problem.kv_grid.region_tokens,
            attention.config(tile, tile.own, tile.step)._replace(
                EXP_SHARE=tile.exp_share,
                GRAD_QUERY_STRIDE=row_stride(grad_query),
                BLOCK_SLOTS=next_power_of_2(problem.topk),
            ),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return statistics, shares


@dataclass(frozen=True)
class KeyValueGradient:
    """Results of dK/dV's launch, and the arguments with which `launch_finish` sums its pieces.

    Attributes:
        results: where the gradients go; `grad_padding` is an output of the plan, or None.
        pieces: arrays that tell which rows were cut; None if no row can be.
        numbers: sizes that `sum_pieces` takes.
        programs: number of programs of `sum_pieces`.
        config: compile-time numbers of dK/dV's kernel and of `sum_pieces`.
        tile: tile of dK/dV's kernel.
    """

    results: KeyValueResults
    pieces: Pieces | None
    numbers: tuple[int, ...]
    programs: int
    config: AttentionConfig
    tile: tiles.Tile


def launch_key_value_gradient(
    plan: Plan,
    attention: Attention,
    lists: QueryLists,
    statistics: Buffer,
    grad_out: Buffer,
    gradients: Gradients[Buffer],
    needs_padding: bool = False,
    adds_to_value: bool = False,
) -> KeyValueGradient:
    """Adds the launch that computes dK and dV.

    It writes them to `gradients`, except those of rows that were cut: `launch_finish` sums their pieces.

    Args:
        plan: where to add it.
        attention: the forward's attention.
        lists: lists of queries that the kernel reads.
        statistics: from `launch_query_gradient`.
        grad_out: gradient of the attention's output, contiguous.
        gradients: where the gradients go.
        needs_padding: whether to compute shares of the gradient of the padding's key and value,
            `(N, num_heads, P_kv, tiles, qk_head_dim + v_head_dim)` float32.
        adds_to_value: whether to add to the values' gradient, which then already holds LePE's share.
    """
    problem, kv_grid = attention.problem, attention.problem.kv_grid
    tile = attention.tile(tiles.KEY_VALUE_GRADIENT, plan.device, problem.factor is not None)
    n_regions, region_tokens = attention.owned(kv_grid)
    head_dims = (problem.qk_head_dim, problem.v_head_dim)
    padding_shares = None
    if needs_padding:
        shape = (problem.batch, problem.num_heads, n_regions, cdiv(region_tokens, tile.own), sum(head_dims))
        padding_shares = plan.output(shape, torch.float32)
    partials = [
        plan.scratch((problem.batch, problem.num_heads, lists.n_partials, region_tokens, d), torch.float32)
        for d in head_dims
    ]
    results = KeyValueResults(gradients.key, gradients.value, padding_shares, *partials)
    config = attention.config(tile, tile.step, tile.own)._replace(
        GRAD_KEY_STRIDE=row_stride(gradients.key),
        GRAD_VALUE_STRIDE=row_stride(gradients.value),
        ADDS_TO_VALUE=adds_to_value,
    )
    kv_tokens, n_pieces = image_tokens(problem.key), lists.n_pieces
    n_pairs = attention.owned(problem.query_grid)[0] * problem.topk
    if attention.form == MASKED:
        n_pairs = problem.query_grid.n_regions
    maps, padding, marks = attention.leading_arguments
    inverse = lists.inverse
    work = None if inverse is None else inverse.work
    programs = problem.batch * cdiv(region_tokens, tile.own) * problem.num_heads
    plan.launch(
        key_value_gradient_kernel,
        (n_pieces * programs,),
        (maps, lists.arguments, padding, marks, work, statistics, grad_out, results),
        (
            *(problem.scale * LOG2_E, problem.scale, image_tokens(problem.query), kv_tokens),
            *(n_pairs, n_regions, n_pieces, lists.n_partials, region_tokens),
            *(attention.owned(problem.query_grid)[1], config),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    pieces = None
    if lists.n_partials and inverse is not None and work is not None:
        assert lists.arguments.region_list is not None
        pieces = Pieces(inverse.row_start, lists.arguments.region_list)
    numbers = (kv_tokens, n_regions, lists.n_partials, region_tokens, lists.longest)
    return KeyValueGradient(results, pieces, numbers, n_regions * programs, config, tile)


def launch_finish(plan: Plan, gradient: KeyValueGradient | None, lepe: LepeShares | None = None) -> None:
    """Adds the launch that sums dK/dV's pieces and LePE's shares, if there are any."""
    pieces, results, config = None, None, None
    sizes: tuple[int, ...] = (1,) * 5
    n_programs, num_warps = 0, 1 if lepe is None else _LEPE_SUM_WARPS
    if gradient is not None and gradient.pieces is not None:
        pieces, results, config = gradient.pieces, gradient.results, gradient.config
        sizes, n_programs = gradient.numbers, gradient.programs
        num_warps = max(num_warps, gradient.tile.num_warps)
    shares: Buffer | None = None
    sums: LepeSums | None = None
    n_sums = n_shares = 0
    sums_config = LepeSumsConfig(1, 1, 1, False, 1, 1, HAS_PIECES=False)
    if lepe is not None:
        shares, sums, n_sums, sums_config = lepe.shares, lepe.sums, lepe.n_sums, lepe.config
        n_shares = lepe.shares.shape[0]
    plan.launch(
        finish_gradients_kernel,
        (n_sums + n_programs,),
        (pieces, results, shares, sums),
        (
            *(*sizes, n_shares, n_sums, config),
            sums_config._replace(HAS_PIECES=pieces is not None),
        ),
        num_warps=num_warps,
    )
