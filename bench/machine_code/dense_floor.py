"""Plain dense attention, the floor that the routed kernels' cost is held against.

The same arithmetic as `bra_triton.kernels`, with everything routing adds left out: contiguous rows, one
length for all, whole tiles, no mask. What a routed loop costs above the cheapest of these is the price of
routing.

| array | shape | meaning |
|---|---|---|
| query, key | (Z, L, QK_HEAD_DIM) | Z = images x heads |
| value | (Z, L, V_HEAD_DIM) | |
| out, grad_out | (Z, L, V_HEAD_DIM) | attention output and its gradient |
| lse | (Z, L) fp32 | log2 of the softmax's denominator, of base-2 logits |
| statistics | (Z, L, 2) fp32 | lse and delta = rowsum(grad_out * out), side by side: one load is cheaper |

Grids are (L / owned rows, Z). L is a multiple of both BLOCK_M and BLOCK_N.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from bra_triton.bench.machine_code.analysis import Analysis, analyse_all
from bra_triton.bench.machine_code.static_analysis import KernelSpecimen
from bra_triton.kernels.lib.matrix import add_matmul, matmul


@triton.jit
def _load_rows(base, start, row, channel, STRIDE: tl.constexpr, SPLIT: tl.constexpr):
    """Rows `start + row`. The same addresses in two forms: which is cheaper depends on the registers left.

    SPLIT adds the start to the pointer, otherwise to the row.
    """
    if SPLIT:
        return tl.load(base + start * STRIDE + (row[:, None] * STRIDE + channel[None, :]))
    else:
        return tl.load(base + (start + row)[:, None] * STRIDE + channel[None, :])


@triton.jit
def attention_forward(
    query,
    key,
    value,
    out,
    lse,
    logit_scale,
    length,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Output and lse of BLOCK_M queries; walks the keys."""
    first = tl.program_id(1).to(tl.int64) * length
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    walked = tl.arange(0, BLOCK_N)
    qk_channel = tl.arange(0, QK_HEAD_DIM)
    v_channel = tl.arange(0, V_HEAD_DIM)
    q = _load_rows(query + first * QK_HEAD_DIM, 0, row, qk_channel, QK_HEAD_DIM, False)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_HEAD_DIM], tl.float32)
    for start in tl.range(0, length, BLOCK_N):
        k = _load_rows(key + first * QK_HEAD_DIM, start, walked, qk_channel, QK_HEAD_DIM, SPLIT)
        v = _load_rows(value + first * V_HEAD_DIM, start, walked, v_channel, V_HEAD_DIM, SPLIT)
        scores = matmul(q, tl.trans(k), PRECISION)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * logit_scale)
        probs = tl.exp2(scores * logit_scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, axis=1)
        acc = add_matmul(acc * rescale[:, None], probs, v, PRECISION)
        row_max = new_max
    rows = out + first * V_HEAD_DIM + row[:, None] * V_HEAD_DIM + v_channel[None, :]
    tl.store(rows, (acc / row_sum[:, None]).to(out.dtype.element_ty))
    tl.store(lse + first + row, row_max + tl.log2(row_sum))


@triton.jit
def query_gradient(
    query,
    key,
    value,
    grad_out,
    statistics,
    grad_query,
    logit_scale,
    scale,
    length,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dQ of BLOCK_M queries; walks the keys."""
    first = tl.program_id(1).to(tl.int64) * length
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    walked = tl.arange(0, BLOCK_N)
    qk_channel = tl.arange(0, QK_HEAD_DIM)
    v_channel = tl.arange(0, V_HEAD_DIM)
    q = _load_rows(query + first * QK_HEAD_DIM, 0, row, qk_channel, QK_HEAD_DIM, False)
    do = _load_rows(grad_out + first * V_HEAD_DIM, 0, row, v_channel, V_HEAD_DIM, False)
    lse, delta = tl.split(_load_rows(statistics + first * 2, 0, row, tl.arange(0, 2), 2, False))
    grad = tl.zeros([BLOCK_M, QK_HEAD_DIM], tl.float32)
    for start in tl.range(0, length, BLOCK_N):
        k = _load_rows(key + first * QK_HEAD_DIM, start, walked, qk_channel, QK_HEAD_DIM, SPLIT)
        v = _load_rows(value + first * V_HEAD_DIM, start, walked, v_channel, V_HEAD_DIM, SPLIT)
        scores = matmul(q, tl.trans(k), PRECISION)
        probs = tl.exp2(scores * logit_scale - lse[:, None])
        grad_probs = matmul(do, tl.trans(v), PRECISION)
        grad = add_matmul(grad, probs * (grad_probs - delta[:, None]), k, PRECISION)
    rows = grad_query + first * QK_HEAD_DIM + row[:, None] * QK_HEAD_DIM + qk_channel[None, :]
    tl.store(rows, (grad * scale).to(grad_query.dtype.element_ty))


@triton.jit
def key_value_gradient(
    query,
    key,
    value,
    grad_out,
    statistics,
    grad_key,
    grad_value,
    logit_scale,
    scale,
    length,
    QK_HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """dK and dV of BLOCK_N keys; walks the queries, everything transposed: keys by queries."""
    first = tl.program_id(1).to(tl.int64) * length
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    walked = tl.arange(0, BLOCK_M)
    qk_channel = tl.arange(0, QK_HEAD_DIM)
    v_channel = tl.arange(0, V_HEAD_DIM)
    k = _load_rows(key + first * QK_HEAD_DIM, 0, row, qk_channel, QK_HEAD_DIM, False)
    v = _load_rows(value + first * V_HEAD_DIM, 0, row, v_channel, V_HEAD_DIM, False)
    grad_k = tl.zeros([BLOCK_N, QK_HEAD_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, V_HEAD_DIM], tl.float32)
    for start in tl.range(0, length, BLOCK_M):
        q = _load_rows(query + first * QK_HEAD_DIM, start, walked, qk_channel, QK_HEAD_DIM, SPLIT)
        do = _load_rows(grad_out + first * V_HEAD_DIM, start, walked, v_channel, V_HEAD_DIM, SPLIT)
        lse, delta = tl.split(_load_rows(statistics + first * 2, start, walked, tl.arange(0, 2), 2, SPLIT))
        scores = matmul(k, tl.trans(q), PRECISION)
        probs = tl.exp2(scores * logit_scale - lse[None, :])
        grad_v = add_matmul(grad_v, probs, do, PRECISION)
        grad_probs = matmul(v, tl.trans(do), PRECISION)
        grad_k = add_matmul(grad_k, probs * (grad_probs - delta[None, :]), q, PRECISION)
    k_rows = grad_key + first * QK_HEAD_DIM + row[:, None] * QK_HEAD_DIM + qk_channel[None, :]
    v_rows = grad_value + first * V_HEAD_DIM + row[:, None] * V_HEAD_DIM + v_channel[None, :]
    tl.store(k_rows, (grad_k * scale).to(grad_key.dtype.element_ty))
    tl.store(v_rows, grad_v.to(grad_value.dtype.element_ty))


KERNELS = {
    "attention_forward": attention_forward,
    "query_gradient": query_gradient,
    "key_value_gradient": key_value_gradient,
}
# Tiles that a program holds at once: of scores (BLOCK_M x BLOCK_N), of accumulators (owned rows x head dim).
_HELD_TILES = {"attention_forward": (1, 1), "query_gradient": (2, 1), "key_value_gradient": (2, 2)}
_FLOAT32 = ("lse", "statistics")


@dataclass(frozen=True)
class DenseTile:
    """One configuration of a dense kernel: owned rows, rows of a step, and how it is compiled."""

    own: int
    step: int
    num_warps: int
    num_stages: int
    split: bool

    def __str__(self) -> str:
        form = " split" if self.split else ""
        return f"{self.own}x{self.step} {self.num_warps}w {self.num_stages}s{form}"


# Kernel, channels of a head, architecture, and what else tells two apart.
Name = tuple[str, int, str, str]


@dataclass(frozen=True)
class Floor:
    """The cheapest loop found that spills nothing; if any such is not serialised, of those."""

    tile: DenseTile
    slots_per_score: float
    analysis: Analysis


def of_tile(own: int, step: int, num_warps: int, num_stages: int) -> tuple[DenseTile, ...]:
    """Dense loops in the tile of another kernel."""
    return tuple(DenseTile(own, step, num_warps, num_stages, split) for split in (False, True))


def specimen(kernel: str, head_dim: int, dtype: str, tile: DenseTile) -> KernelSpecimen:
    """A dense kernel to compile.

    Args:
        kernel: a key of `KERNELS`.
        head_dim: channels of queries, keys and values; a power of two of at least 16.
        dtype: Triton's name: fp16, bf16 or fp32.
        tile: its configuration.
    """
    block_m, block_n = (tile.step, tile.own) if kernel == "key_value_gradient" else (tile.own, tile.step)
    constexprs: dict[str, Any] = {
        "QK_HEAD_DIM": head_dim,
        "V_HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        "SPLIT": tile.split,
    }
    signature = {}
    for name in KERNELS[kernel].arg_names:
        if name in ("logit_scale", "scale"):
            signature[name] = "fp32"
        elif name == "length":
            signature[name] = "i32"
        elif name not in constexprs:
            signature[name] = "*fp32" if name in _FLOAT32 else f"*{dtype}"
    divisible = frozenset(name for name, kind in signature.items() if kind != "fp32")
    return KernelSpecimen(
        f"dense {kernel}", KERNELS[kernel], signature, constexprs, divisible, tile.num_warps, tile.num_stages
    )


def may_fit_registers(kernel: str, head_dim: int, tile: DenseTile) -> bool:
    """Whether scores and accumulators alone leave a thread 32 of its 255 registers; else it would spill."""
    scores, accumulators = _HELD_TILES[kernel]
    elements = tile.own * (scores * tile.step + accumulators * head_dim)
    return elements // (32 * tile.num_warps) <= 255 - 32


def find_floors(
    wanted: Mapping[Name, Sequence[DenseTile]], dtype: str = "fp16", workers: int = 1
) -> dict[Name, Floor]:
    """The cheapest sound dense loop for every name.

    Args:
        wanted: the tiles to try for each; architectures are NVIDIA's.
        dtype: Triton's name of the element type.
        workers: processes that compile.

    Returns:
        Floors by the names of `wanted`, without those where every tile spills.
    """
    jobs = [
        (name, tile, specimen(name[0], name[1], dtype, tile))
        for name, tiles in wanted.items()
        for tile in dict.fromkeys(tiles)
        if may_fit_registers(name[0], name[1], tile)
    ]
    floors: dict[Name, Floor] = {}
    analyses = analyse_all([(each, name[2]) for name, _, each in jobs], workers)
    for (name, tile, _), analysis in zip(jobs, analyses, strict=True):
        if isinstance(analysis, Exception) or analysis.usage.spills or analysis.loop is None:
            continue
        floor = Floor(tile, analysis.slots_per_score, analysis)
        if name not in floors or _rank(floor) < _rank(floors[name]):
            floors[name] = floor
    return floors


def _rank(floor: Floor) -> tuple[bool, float]:
    return floor.analysis.serialised, floor.slots_per_score
