"""Launches of the attention kernels, forward and backward."""

import math

import torch
from torch import Tensor

from .. import tiles
from ..grid import RegionGrid
from ..lepe.arguments import LepeParts
from ..lepe.launch import lepe_forward
from ..lib.integers import cdiv, next_power_of_2
from ..lib.maps import image_tokens, row_stride
from ..problem import Gradients, Lepe, Padding, RoutedAttention, SmallGradients
from ..routing.arguments import Marks
from ..routing.lists import KeyLists, list_keys, list_queries
from . import masking
from .arguments import AttentionConfig, ForwardResults, KeyValueResults, Lists, Maps, QueryResults, Saved
from .forward import attention_forward_kernel
from .key_value_gradient import key_value_gradient_kernel, sum_pieces_kernel
from .query_gradient import query_gradient_kernel

LOG2_E = math.log2(math.e)
# Tokens in a step at the end of a list. A step of 128 keys would waste 112 of them at the end of 400. Narrow
# steps also take fewer registers: with them the widest tiles do not spill.
TAIL_STEP = 32


def attention_forward(
    problem: RoutedAttention, lepe: Lepe | None = None, keep_attention: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attends from every query region to the key regions it chose, and adds LePE.

    Args:
        problem: float32, float16 or bfloat16 maps.
        lepe: the convolution to add; None for none.
        keep_attention: return the attention's share of the output, which the backward needs.

    Returns:
        `out` `(N, H, W, num_heads * v_head_dim)` of the maps' dtype; the attention's share of it, None
        without LePE and where it is not kept; and `lse` `(N, num_heads, H, W)` float32, the base-2 logarithm
        of the softmax's denominator for logits times `log2(e)`.
    """
    masked = masking.is_cheaper(problem)
    tile = _tile(tiles.FORWARD, problem, masked)
    fused = lepe if tile.fuses_lepe else None
    out = problem.query.new_empty(*problem.query.shape[:3], problem.value.shape[-1])
    attention = torch.empty_like(out) if fused is not None and keep_attention else None
    lse = problem.query.new_empty(
        problem.batch, problem.num_heads, *problem.query.shape[1:3], dtype=torch.float32
    )
    if problem.batch:
        _forward(problem, fused, tile, masked, ForwardResults(out, attention, lse))
    if lepe is not None and fused is None:
        return lepe_forward(out, lepe), out if keep_attention else None, lse
    return out, attention, lse


def _forward(
    problem: RoutedAttention,
    lepe: Lepe | None,
    tile: tiles.Tile,
    masked: bool,
    results: ForwardResults,
) -> None:
    """Writes what `attention_forward` returns, with a LePE that is fused."""
    lists = list_keys(problem, masked)
    grid = problem.query_grid
    bottom, right = grid.padding
    with torch.cuda.device_of(problem.query):
        attention_forward_kernel[_grid(problem, tile, masked)](
            _maps(problem),
            Lists(lists.region_list, lists.key_list, lists.factors),
            problem.padding,
            lists.marks,
            None if lepe is None else LepeParts.of(lepe),
            results,
            problem.scale * LOG2_E,
            *_query_side_sizes(problem, lists),
            *(grid.height, grid.width, grid.height + bottom, grid.width + right),
            CONFIG=_config(problem, tile, lists.marks, tile.own, tile.step)._replace(
                EXP_SHARE=tile.exp_share,
                LEPE_STRIDE=0 if lepe is None else row_stride(lepe.value),
                LEPE_KERNEL=0 if lepe is None else lepe.kernel_size,
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def attention_backward(
    grad_out: Tensor,
    problem: RoutedAttention,
    out: Tensor,
    lse: Tensor,
    gradients: Gradients,
    needs_factor: bool = False,
) -> SmallGradients:
    """Gradients of one attention; the same bits for the same input.

    Args:
        grad_out: contiguous `(N, H, W, num_heads * v_head_dim)`.
        problem: the forward's.
        out: the attention's share of what the forward returned.
        lse: what the forward returned.
        gradients: maps to write.
        needs_factor: compute the gradient of the factor, too.
    """
    if not problem.batch:
        return _no_gradients(problem, needs_factor)
    statistics = lse.new_empty(*lse.shape, 2)
    grad_factor = _query_gradient(grad_out, problem, out, lse, statistics, gradients, needs_factor)
    grad_padding = _key_value_gradient(grad_out, problem, statistics, gradients)
    return SmallGradients(grad_factor, grad_padding)


def _no_gradients(problem: RoutedAttention, needs_factor: bool) -> SmallGradients:
    """Zeros, of an empty batch."""
    factor = problem.r_idx.new_zeros(problem.r_idx.shape, dtype=torch.float32) if needs_factor else None
    if problem.padding is None:
        return SmallGradients(factor, None)
    key, value = (
        torch.zeros_like(x, dtype=torch.float32) for x in (problem.padding.key, problem.padding.value)
    )
    return SmallGradients(factor, Padding(key, value))


def _query_gradient(
    grad_out: Tensor,
    problem: RoutedAttention,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    gradients: Gradients,
    needs_factor: bool,
) -> Tensor | None:
    """dQ into `gradients`, (lse, delta) into `statistics`; returns the factor's gradient if asked for."""
    masked = not needs_factor and masking.is_cheaper(problem)
    lists = list_keys(problem, masked)
    tile = _tile(tiles.QUERY_GRADIENT, problem, masked, needs_factor)
    shares = None
    if needs_factor:
        n_tiles = cdiv(problem.query_grid.region_tokens, tile.own)
        shares = lse.new_empty(
            problem.batch, problem.num_heads, problem.query_grid.n_regions, n_tiles, problem.topk
        )
    with torch.cuda.device_of(grad_out):
        query_gradient_kernel[_grid(problem, tile, masked)](
            _maps(problem),
            Lists(lists.region_list, lists.key_list, lists.factors),
            problem.padding,
            lists.marks,
            Saved(out, lse, grad_out),
            QueryResults(gradients.query, statistics, shares),
            *(problem.scale * LOG2_E, problem.scale),
            *_query_side_sizes(problem, lists),
            problem.kv_grid.region_tokens,
            CONFIG=_config(problem, tile, lists.marks, tile.own, tile.step)._replace(
                EXP_SHARE=tile.exp_share,
                GRAD_QUERY_STRIDE=row_stride(gradients.query),
                BLOCK_SLOTS=next_power_of_2(problem.topk),
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if shares is None:
        return None
    by_head = shares.sum(dim=3)
    return by_head.sum(dim=1, keepdim=True) if problem.n_graphs == 1 else by_head


def _key_value_gradient(
    grad_out: Tensor, problem: RoutedAttention, statistics: Tensor, gradients: Gradients
) -> Padding | None:
    """dK and dV into `gradients`; returns the padding's gradient where there is padding."""
    masked = masking.is_cheaper(problem)
    lists = list_queries(problem, masked)
    tile = _tile(tiles.KEY_VALUE_GRADIENT, problem, masked)
    n_regions, region_tokens = _owned(problem.kv_grid, masked)
    shares = None
    if problem.padding is not None:
        n_tiles = cdiv(region_tokens, tile.own)
        head_dims = problem.qk_head_dim + problem.v_head_dim
        shares = statistics.new_empty(problem.batch, problem.num_heads, n_regions, n_tiles, head_dims)
    partial_key, partial_value = (
        statistics.new_empty(problem.batch, problem.num_heads, lists.n_partials, region_tokens, head_dim)
        for head_dim in (problem.qk_head_dim, problem.v_head_dim)
    )
    n_pieces = 1 if lists.work is None else lists.work.shape[2]
    results = KeyValueResults(gradients.key, gradients.value, shares, partial_key, partial_value)
    config = _config(problem, tile, lists.marks, tile.step, tile.own)._replace(
        GRAD_KEY_STRIDE=row_stride(gradients.key),
        GRAD_VALUE_STRIDE=row_stride(gradients.value),
        QUERY_IS_PADDED=problem.query_grid.is_padded,
    )
    kv_tokens = image_tokens(problem.key)
    _, query_region_tokens = _owned(problem.query_grid, masked)
    programs = problem.batch * cdiv(region_tokens, tile.own) * problem.num_heads
    with torch.cuda.device_of(grad_out):
        key_value_gradient_kernel[(n_pieces * programs,)](
            _maps(problem),
            Lists(lists.region_list, lists.query_list, lists.factors),
            problem.padding,
            lists.marks,
            *(lists.work, statistics, grad_out, results),
            *(problem.scale * LOG2_E, problem.scale, image_tokens(problem.query), kv_tokens),
            problem.query_grid.n_regions * (1 if masked else problem.topk),
            *(n_regions, n_pieces, lists.n_partials, region_tokens, query_region_tokens),
            CONFIG=config,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if lists.n_partials:
            sum_pieces_kernel[(n_regions * programs,)](
                *(lists.row_start, lists.work, lists.region_list, results),
                *(kv_tokens, n_regions, n_pieces, lists.n_partials, region_tokens, lists.longest),
                CONFIG=config,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    if shares is None:
        return None
    key, value = shares.sum(dim=(0, 2, 3)).split([problem.qk_head_dim, problem.v_head_dim], dim=-1)
    return Padding(key.flatten(), value.flatten())


def _tile(kernel: str, problem: RoutedAttention, masked: bool, needs_factor: bool = False) -> tiles.Tile:
    if masked:
        return tiles.MASKED[kernel]
    grid = problem.kv_grid if kernel == tiles.KEY_VALUE_GRADIENT else problem.query_grid
    heads = (problem.qk_head_dim, problem.v_head_dim)
    is_weighted = needs_factor or problem.factor is not None
    form = tiles.form_of(heads, problem.padding is not None, problem.n_graphs, is_weighted)
    dtype, device = problem.query.dtype, problem.query.device
    return tiles.choose(kernel, dtype, max(heads), grid.region_tokens, device, form)


def _owned(grid: RegionGrid, masked: bool) -> tuple[int, int]:
    """Regions whose tokens programs own, and tokens of each; in masked attention one holds the whole map."""
    return (1, grid.n_regions * grid.region_tokens) if masked else (grid.n_regions, grid.region_tokens)


def _grid(problem: RoutedAttention, tile: tiles.Tile, masked: bool) -> tuple[int]:
    """Programs of a kernel that owns queries."""
    rows, region_tokens = _owned(problem.query_grid, masked)
    return (problem.batch * rows * cdiv(region_tokens, tile.own) * problem.num_heads,)


def _maps(problem: RoutedAttention) -> Maps:
    return Maps(problem.query, problem.key, problem.value)


def _config(
    problem: RoutedAttention, tile: tiles.Tile, marks: Marks | None, block_m: int, block_n: int
) -> AttentionConfig:
    """Compile-time numbers that the kernels share, for tiles of `block_m` queries and `block_n` keys."""
    return AttentionConfig(
        NUM_HEADS=problem.num_heads,
        N_GRAPHS=problem.n_graphs,
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
        PRECISION=_dot_precision(problem.query.dtype),
    )


def _query_side_sizes(problem: RoutedAttention, lists: KeyLists) -> tuple[int, ...]:
    """Sizes that the kernels that own queries take, in their order."""
    return (
        image_tokens(problem.query),
        image_tokens(problem.key),
        problem.query_grid.n_regions,
        _owned(problem.query_grid, lists.marks is not None)[1],
        lists.key_list.shape[-1],
    )


def _dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 products, after PyTorch's own setting for them.

    Without TF32, three TF32 products on NVIDIA, which keep float32's accuracy to about 1e-6: plain float32
    products run off the matrix units, at 2.5 times the issue slots (95 against 39 a score in the forward at
    head 32, compiled for sm_90), and spill. AMD has plain ones alone.
    """
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if _tf32_is_allowed() else "tf32x3"


def _tf32_is_allowed() -> bool:
    # PyTorch 2.9 brought this setting, and lets no one read the older one once it has been used.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"
