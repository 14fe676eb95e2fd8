"""From instruction counts to predicted time: pure arithmetic on what the compiler produced.

A program (thread block) is taken to execute its straight-line code once, and its loops as often as the
problem says:

    warp instructions = rest + whole tiles x loop + tail steps x tail + taps x (one tap of LePE)

Predicated instructions count as executed, and rows of dK/dV have the mean length. Bounds suppose that nothing
but the unit in question costs time, at documented peak rates; latency and caches are left out. What tiles
compete with (`Cost.cost`, `loop_cost`) counts latency by `hardware.LATENCY_WARPS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from bra_triton.bench.machine_code.analysis import Analysis
from bra_triton.bench.machine_code.hardware import Hardware, latency
from bra_triton.bench.machine_code.static_analysis import LoopMix
from bra_triton.kernels.lepe.launch import FORWARD_TILE as LEPE_TILE
from bra_triton.kernels.tiles import channel_block

ATTENTION_KERNELS = ("attention_forward", "query_gradient", "key_value_gradient")
# Multiply-adds of the matrix products for one score, in query/key and value channels.
_PRODUCTS = {"attention_forward": (1, 1), "query_gradient": (2, 1), "key_value_gradient": (2, 2)}


@dataclass(frozen=True)
class ProblemSizes:
    """What the cost of a routed attention depends on.

    Attributes:
        batch: images.
        regions: query regions an image, `P`.
        region_tokens: queries of a region, `S`.
        topk: key regions that each chose.
        kv_tokens: keys of a region, `S_kv`.
        num_heads: attention heads.
        qk_head_dim: channels of a query or key in one head.
        v_head_dim: channels of a value in one head.
        element_bytes: 2 or 4.
        kv_regions: key regions an image; None for `regions`.
        masked: all queries meet all keys, under a mask.
    """

    batch: int
    regions: int
    region_tokens: int
    topk: int
    kv_tokens: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    element_bytes: int = 2
    kv_regions: int | None = None
    masked: bool = False

    @property
    def key_regions(self) -> int:
        """Key regions an image."""
        return self.regions if self.kv_regions is None else self.kv_regions

    def merged(self) -> "ProblemSizes":
        """The same with one region, where every region attends to all; as launches have it."""
        tokens, kv_tokens = self.regions * self.region_tokens, self.key_regions * self.kv_tokens
        return replace(self, regions=1, region_tokens=tokens, topk=1, kv_tokens=kv_tokens, kv_regions=None)

    @property
    def useful_scores(self) -> int:
        """Scores that the result depends on: every query against its keys, in every head."""
        pairs = self.region_tokens * self.topk * self.kv_tokens
        return self.batch * self.num_heads * self.regions * pairs


@dataclass(frozen=True)
class Walk:
    """How an attention kernel cuts a problem into programs and steps.

    Attributes:
        programs: thread blocks of the launch.
        whole_tiles: steps of a program over whole tiles.
        tail_steps: narrower steps that follow, masked.
        scores: that a program computes, masked ones and those past the region's end included.
    """

    programs: int
    whole_tiles: int
    tail_steps: int
    scores: int


@dataclass(frozen=True)
class Cost:
    """Prediction for one launch of an attention kernel.

    Attributes:
        useful_scores: `ProblemSizes.useful_scores`.
        issue_slots: thread instruction slots, all programs.
        bytes_moved: every map read or written once.
        bytes_requested: as the programs ask for them, tile by tile; the difference is the caches' work.
        bounds: seconds by unit: issue, exponential, matrix, memory.
        ideal_seconds: what useful scores alone would take on the slowest unit but issue, the whole GPU busy.
        resident_warps: warps an SM; 0 where a block does not fit.
    """

    useful_scores: int
    issue_slots: float
    bytes_moved: int
    bytes_requested: int
    bounds: dict[str, float]
    ideal_seconds: float
    resident_warps: int

    @property
    def slots_per_useful_score(self) -> float:
        """Issue slots of the whole kernel for one useful score."""
        return self.issue_slots / self.useful_scores

    @property
    def cost(self) -> float:
        """What configurations compete with: `slots_per_useful_score`, and the time that warps wait."""
        return self.slots_per_useful_score * latency(self.resident_warps)

    @property
    def binding(self) -> str:
        """The unit that takes longest."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def seconds(self) -> float:
        """Time that no launch of this code can beat; infinite where a block does not fit."""
        return self.bounds[self.binding] if self.resident_warps else math.inf

    @property
    def seconds_per_useful_score(self) -> float:
        """Predicted time of one useful score."""
        return self.seconds / self.useful_scores

    @property
    def share_of_ideal(self) -> float:
        """`ideal_seconds` over `seconds`: 1 when nothing but the unavoidable takes time."""
        return self.ideal_seconds / self.seconds


def loop_cost(code: Analysis, hardware: Hardware) -> float:
    """Issue slots of the loop for a score, and the time that warps wait; see `hardware.LATENCY_WARPS`."""
    usage = code.usage
    warps = hardware.resident_warps(usage.registers, usage.shared_bytes, code.num_warps)
    return code.slots_per_score * latency(warps)


def predict(
    kernel: str, code: Analysis, problem: ProblemSizes, hardware: Hardware, matrix_passes: int = 1
) -> Cost:
    """Predicts a launch of an attention kernel from its counted code.

    Args:
        kernel: one of `ATTENTION_KERNELS`.
        code: its counts.
        problem: sizes.
        hardware: rates.
        matrix_passes: matrix products for one product, 3 for tf32x3.

    Raises:
        ValueError: the kernel is unknown, or its code has no loop with matrix products.
    """
    if kernel not in ATTENTION_KERNELS:
        raise ValueError(f"kernel is {kernel!r}; the cost model knows {', '.join(ATTENTION_KERNELS)}")
    if code.loop is None:
        raise ValueError(f"{kernel} has no loop with matrix instructions: not an attention kernel's code")
    walk = walk_of(kernel, code.block_m, code.block_n, code.block_tail, problem)
    # The last SM to finish decides, so work counts in whole programs an SM.
    rounds = -(-walk.programs // hardware.sms)
    per_program = 32 * code.num_warps * _executed(code, walk, lambda mix: mix.total)
    exponentials = 32 * code.num_warps * _executed(code, walk, lambda mix: mix.counts["exponentials"])
    fma = walk.scores * matrix_passes * fma_per_score(kernel, problem, padded=True)
    rate = hardware.half_fma if problem.element_bytes == 2 else hardware.tf32_fma
    moved = bytes_moved(kernel, problem)
    bounds = {
        "issue": rounds * per_program / hardware.issue_slots / hardware.clock,
        "exponential": rounds * exponentials / hardware.exponentials / hardware.clock,
        "matrix": rounds * fma / rate / hardware.clock,
        "memory": moved / hardware.bandwidth,
    }
    useful = problem.useful_scores
    clocks = max(
        1 / hardware.exponentials, matrix_passes * fma_per_score(kernel, problem, padded=False) / rate
    )
    return Cost(
        useful,
        walk.programs * per_program,
        moved,
        bytes_requested(kernel, code.block_m, code.block_n, problem),
        bounds,
        max(useful * clocks / hardware.sms / hardware.clock, bounds["memory"]),
        hardware.resident_warps(code.usage.registers, code.usage.shared_bytes, code.num_warps),
    )


def lepe_apart_over_fused(
    fused: Analysis, bare: Analysis, lepe: Analysis, problem: ProblemSizes, hardware: Hardware
) -> float:
    """Predicted time of attention and LePE in two launches over that in one, of a forward for training.

    Args:
        fused: the forward with LePE.
        bare: the forward without.
        lepe: the convolution's own kernel, which adds the attention's output.
        problem: sizes.
        hardware: rates.
    """
    passes = 3 if problem.element_bytes == 4 else 1
    one, first = (predict("attention_forward", code, problem, hardware, passes) for code in (fused, bare))
    tokens = problem.batch * problem.regions * problem.region_tokens
    dim = problem.num_heads * problem.v_head_dim
    map_seconds = tokens * dim * problem.element_bytes / hardware.bandwidth
    programs = -(-tokens // LEPE_TILE[0]) * -(-dim // LEPE_TILE[1])
    executed = _executed(lepe, Walk(programs, 0, 0, 0), lambda mix: mix.total)
    slots = 32 * lepe.num_warps * executed * -(-programs // hardware.sms)
    second = max(slots / hardware.issue_slots / hardware.clock, 3 * map_seconds)
    # The backward needs the attention's own output, which the fused kernel writes beside the sum.
    together = max(one.seconds, one.bounds["memory"] + map_seconds)
    return (first.seconds + second) / together


def walk_of(kernel: str, block_m: int, block_n: int, block_tail: int, problem: ProblemSizes) -> Walk:
    """Programs and steps of an attention kernel with such tiles; a tail of 0 is as wide as a whole step."""
    if kernel == "key_value_gradient":
        own, step, owned, regions = block_n, block_m, problem.kv_tokens, problem.key_regions
        length = round(problem.regions * problem.topk / regions * problem.region_tokens)
    else:
        own, step, owned, regions = block_m, block_n, problem.region_tokens, problem.regions
        length = problem.topk * problem.kv_tokens
    if problem.masked:
        length = problem.regions * problem.region_tokens
        owned, regions = owned * regions, 1
        if kernel != "key_value_gradient":
            length = problem.key_regions * problem.kv_tokens
    programs = problem.batch * problem.num_heads * regions * -(-owned // own)
    tail = block_tail or step
    whole, tail_steps = length // step, -(-(length % step) // tail)
    return Walk(programs, whole, tail_steps, own * (whole * step + tail_steps * tail))


def fma_per_score(kernel: str, problem: ProblemSizes, padded: bool) -> int:
    """Multiply-adds of the matrix products for one score; padded: heads as wide as their tiles."""
    qk, v = _PRODUCTS[kernel]
    if padded:
        return qk * channel_block(problem.qk_head_dim) + v * channel_block(problem.v_head_dim)
    return qk * problem.qk_head_dim + v * problem.v_head_dim


def bytes_moved(kernel: str, problem: ProblemSizes) -> int:
    """Bytes of a launch that reads and writes every map once."""
    queries, keys, graph = _token_heads(problem)
    qk, v = (problem.element_bytes * dim for dim in (problem.qk_head_dim, problem.v_head_dim))
    if kernel == "attention_forward":
        return queries * (qk + v + 4) + keys * (qk + v) + graph
    if kernel == "query_gradient":  # query, out, grad_out, lse; writes dQ and the statistics
        return queries * (2 * qk + 2 * v + 4 + 8) + keys * (qk + v) + graph
    return queries * (qk + v + 8) + keys * 2 * (qk + v) + graph


def bytes_requested(kernel: str, block_m: int, block_n: int, problem: ProblemSizes) -> int:
    """Bytes that the programs load and store, counted where each asks; masked rows ask for nothing."""
    qk, v = (problem.element_bytes * dim for dim in (problem.qk_head_dim, problem.v_head_dim))
    queries, keys, _ = _token_heads(problem)
    moved = bytes_moved(kernel, problem)
    if problem.masked:
        owned, own = (keys, block_n) if kernel == "key_value_gradient" else (queries, block_m)
        tiles = -(-owned // (problem.batch * problem.num_heads) // own)
        again = (tiles - 1) * (queries if kernel == "key_value_gradient" else keys)
        return moved + again * (qk + v + (8 if kernel == "key_value_gradient" else 0))
    pairs = problem.batch * problem.num_heads * problem.regions * problem.topk
    if kernel == "key_value_gradient":
        walked = pairs * -(-problem.kv_tokens // block_n) * problem.region_tokens
        return moved + (walked - queries) * (qk + v + 8)
    walked = pairs * -(-problem.region_tokens // block_m) * problem.kv_tokens
    return moved + (walked - keys) * (qk + v)


def _token_heads(problem: ProblemSizes) -> tuple[int, int, int]:
    """Queries and keys of a launch, each counted once a head, and the bytes of the graph."""
    each = problem.batch * problem.num_heads
    graph = 4 * problem.batch * problem.regions * problem.topk
    return (
        each * problem.regions * problem.region_tokens,
        each * problem.key_regions * problem.kv_tokens,
        graph,
    )


def _executed(code: Analysis, walk: Walk, count: Callable[[LoopMix], int]) -> int:
    """Instructions of some kind that a warp executes."""
    times = (
        (code.rest, 1),
        (code.loop, walk.whole_tiles),
        (code.tail, walk.tail_steps),
        (code.taps, code.n_taps),
    )
    return sum(count(mix) * number for mix, number in times if mix is not None)
