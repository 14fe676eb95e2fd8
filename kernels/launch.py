"""Launches of the kernels: shapes of the outputs, grids, tile choice. No synchronisation with the device."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import backward, forward, routing, tiles

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Problem:
    """Sizes of one attention over a batch of packed projections.

    Attributes:
        batch: images, `N`.
        region_height: tokens in a column of a region.
        region_width: tokens in a row of a region.
        n_win: regions a side, so `P = n_win**2`.
        topk: regions that every region attends to.
        num_heads: attention heads.
        qk_head_dim: channels of a query or key in one head.
        v_head_dim: channels of a value in one head.
        scale: factor of the logits.
    """

    batch: int
    region_height: int
    region_width: int
    n_win: int
    topk: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    scale: float

    @property
    def n_regions(self) -> int:
        """Regions in an image, `P`."""
        return self.n_win**2

    @property
    def region_tokens(self) -> int:
        """Tokens in a region, `S`."""
        return self.region_height * self.region_width

    @property
    def qk_dim(self) -> int:
        """Channels of the queries, all heads together."""
        return self.num_heads * self.qk_head_dim

    @property
    def dim(self) -> int:
        """Channels of the values, all heads together."""
        return self.num_heads * self.v_head_dim

    @property
    def packed_dim(self) -> int:
        """Channels of the packed projection."""
        return 2 * self.qk_dim + self.dim


def region_routing(qkv: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Routes regions by their mean queries and keys.

    Args:
        qkv: contiguous `(N, H, W, 2*qk_dim + dim)`; float32, float16 or bfloat16.
        problem: its sizes.

    Returns:
        `r_weight` (float32) and `r_idx` (int32), both `(N, P, topk)`.
    """
    n_rows = problem.batch * problem.n_regions
    means = qkv.new_empty(problem.batch, problem.n_regions, 2 * problem.qk_dim, dtype=torch.float32)
    r_weight = qkv.new_empty(problem.batch, problem.n_regions, problem.topk, dtype=torch.float32)
    r_idx = torch.empty_like(r_weight, dtype=torch.int32)
    if n_rows == 0:
        return r_weight, r_idx
    block_c = min(64, triton.next_power_of_2(2 * problem.qk_dim))
    with torch.cuda.device_of(qkv):
        routing.region_means[(n_rows, triton.cdiv(2 * problem.qk_dim, block_c))](
            qkv,
            means,
            problem.region_height,
            problem.region_width,
            N_WIN=problem.n_win,
            MEAN_DIM=2 * problem.qk_dim,
            PACKED=problem.packed_dim,
            BLOCK_TOKENS=min(32, triton.next_power_of_2(problem.region_tokens)),
            BLOCK_C=block_c,
            num_warps=4,
        )
        block_r = triton.next_power_of_2(problem.n_regions)
        routing.route[(n_rows,)](
            means,
            r_weight,
            r_idx,
            problem.scale,
            N_REGIONS=problem.n_regions,
            TOPK=problem.topk,
            QK_DIM=problem.qk_dim,
            BLOCK_R=block_r,
            # A tile of at most 4096 logit products: 32 registers a thread.
            BLOCK_C=max(1, min(triton.next_power_of_2(problem.qk_dim), 4096 // block_r)),
            BLOCK_K=triton.next_power_of_2(problem.topk),
            num_warps=4,
        )
    return r_weight, r_idx


def inverse_graph(r_idx: Tensor, n_regions: int) -> tuple[Tensor, Tensor]:
    """For every key region the query regions that chose it, as compressed rows.

    Args:
        r_idx: contiguous `(N, P, topk)` int32, entries in `[0, P)`.
        n_regions: `P`.

    Returns:
        `row_start` `(N, P + 1)` and `choosers` `(N, P * topk)`, int32: the regions that chose `r` are
        `choosers[row_start[r]:row_start[r + 1]]`, ascending.
    """
    batch, _, topk = r_idx.shape
    row_start = r_idx.new_empty(batch, n_regions + 1)
    choosers = r_idx.new_empty(batch, n_regions * topk)
    if batch:
        with torch.cuda.device_of(r_idx):
            routing.invert_graph[(batch * n_regions,)](
                r_idx,
                row_start,
                choosers,
                N_REGIONS=n_regions,
                TOPK=topk,
                BLOCK=min(1024, triton.next_power_of_2(n_regions * topk)),
                num_warps=4,
            )
    return row_start, choosers


def attention_forward(qkv: Tensor, r_idx: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Attends from every region to the regions it chose.

    Args:
        qkv: contiguous `(N, H, W, 2*qk_dim + dim)`; float32, float16 or bfloat16.
        r_idx: contiguous `(N, P, topk)` int32, entries in `[0, P)`.
        problem: their sizes.

    Returns:
        `out` `(N, H, W, dim)` of the dtype of `qkv`, and `lse` `(N, num_heads, P, S)` float32, the base-2
        logarithm of the softmax's denominator for logits times `log2(e)`.
    """
    out = qkv.new_empty(*qkv.shape[:3], problem.dim)
    lse = qkv.new_empty(
        problem.batch, problem.num_heads, problem.n_regions, problem.region_tokens, dtype=torch.float32
    )
    if problem.batch:
        grid, constants = _attention_launch(tiles.FORWARD, qkv, problem)
        with torch.cuda.device_of(qkv):
            forward.attention_forward[grid](
                qkv,
                r_idx,
                out,
                lse,
                problem.scale * LOG2_E,
                problem.region_height,
                problem.region_width,
                TOPK=problem.topk,
                **constants,
            )
    return out, lse


def attention_backward(
    grad_out: Tensor, qkv: Tensor, r_idx: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> Tensor:
    """Gradient of the packed projection; `qkv` to `lse` as in `attention_forward`.

    Args:
        grad_out: contiguous `(N, H, W, dim)`.
        qkv: the forward's.
        r_idx: the forward's.
        out: the forward's.
        lse: the forward's.
        problem: their sizes.

    Returns:
        `(N, H, W, 2*qk_dim + dim)`, the same bits for the same input.
    """
    grad_qkv = torch.empty_like(qkv)
    if not problem.batch:
        return grad_qkv
    row_start, choosers = inverse_graph(r_idx, problem.n_regions)
    statistics = qkv.new_empty(*lse.shape, 2, dtype=torch.float32)
    scalars = (problem.scale * LOG2_E, problem.scale, problem.region_height, problem.region_width)
    with torch.cuda.device_of(qkv):
        grid, constants = _attention_launch(tiles.QUERY_GRADIENT, qkv, problem)
        backward.query_gradient[grid](
            qkv, r_idx, out, lse, grad_out, statistics, grad_qkv, *scalars, TOPK=problem.topk, **constants
        )
        grid, constants = _attention_launch(tiles.KEY_VALUE_GRADIENT, qkv, problem)
        backward.key_value_gradient[grid](
            qkv,
            row_start,
            choosers,
            statistics,
            grad_out,
            grad_qkv,
            *scalars,
            TOPK=problem.topk,
            **constants,
        )
    return grad_qkv


def _attention_launch(kernel: str, qkv: Tensor, problem: Problem) -> tuple[tuple[int], dict]:
    """Grid and compile-time arguments of one of the three attention kernels."""
    tile = tiles.choose(
        kernel, qkv.dtype, max(problem.qk_head_dim, problem.v_head_dim), problem.region_tokens
    )
    programs = (
        problem.batch * problem.n_regions * triton.cdiv(problem.region_tokens, tile.own) * problem.num_heads
    )
    owns_keys = kernel == tiles.KEY_VALUE_GRADIENT
    return (programs,), {
        "N_WIN": problem.n_win,
        "NUM_HEADS": problem.num_heads,
        "QK_HEAD_DIM": problem.qk_head_dim,
        "V_HEAD_DIM": problem.v_head_dim,
        "BLOCK_M": tile.step if owns_keys else tile.own,
        "BLOCK_N": tile.own if owns_keys else tile.step,
        "BLOCK_QK": tiles.channel_block(problem.qk_head_dim),
        "BLOCK_V": tiles.channel_block(problem.v_head_dim),
        "PRECISION": _dot_precision(qkv.dtype),
        "num_warps": tile.num_warps,
        # AMD's compute units have 64 KiB of shared memory, too little for a second stage of wide heads.
        "num_stages": 1 if torch.version.hip else tile.num_stages,
    }


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
