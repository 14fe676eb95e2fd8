"""Predicts the time of a launch from instruction counts: pure arithmetic on what the compiler produced.

The model assumes that a program (thread block) executes its straight-line code once, and its loops as often
as the problem requires:

    warp instructions = rest + whole tiles x loop + tail steps x tail + taps x (one tap of LePE)

Predicated instructions count as executed, and all rows of the inverse graph (in dK/dV) have the mean length.
A bound is the time that one unit takes at its documented peak rate, as if nothing else took time; it leaves
out latency and caches. Tiles are ranked by `Cost.cost`, which includes latency (`hardware.LATENCY_WARPS`).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bra_triton.bench.machine_code.hardware import Hardware, latency
from bra_triton.bench.machine_code.static_analysis import Analysis, Mix
from bra_triton.bench.problems import Problem
from bra_triton.kernels import tiles

# Matrix products of one score: how many over the query/key channels, and how many over the value channels.
_PRODUCTS = {
    "attention_forward": (1, 1),
    "query_gradient": (2, 1),
    "key_value_gradient": (2, 2),
    "small_map_forward": (1, 1),
    # The backward of a small map computes scores as `key_value_gradient` in its loop over whole tiles, and as
    # `query_gradient` in that of its tail; see `walk_of`.
}


class Walk(NamedTuple):
    """How an attention kernel cuts a problem into programs and steps."""

    programs: int  # thread blocks of the launch
    whole_tiles: float  # steps of a program over whole tiles, on average
    tail_steps: float  # narrower, masked steps after them, on average
    scores: float  # that a program computes, including masked ones and those past the region's end


@dataclass(frozen=True)
class Cost:
    """Prediction for one launch of an attention kernel."""

    useful_scores: int  # `Problem.useful_scores`
    issue_slots: float  # thread instruction slots of all programs
    bounds: dict[str, float]  # seconds by unit: issue, exponential, matrix
    resident_warps: int  # per SM; 0 if not even one block fits

    @property
    def slots_per_useful_score(self) -> float:
        """Issue slots of the whole kernel for one useful score."""
        return self.issue_slots / self.useful_scores

    @property
    def cost(self) -> float:
        """The figure by which tiles are ranked: `slots_per_useful_score` times a factor for waiting warps."""
        return self.slots_per_useful_score * latency(self.resident_warps)


def predict(
    kernel: str, code: Analysis, problem: Problem, gpu: Hardware, element_bytes: int = 2, masked: bool = False
) -> Cost:
    """Predicts a launch of an attention kernel, routed or of a small map, from its counted code.

    A product of elements of 4 bytes counts as three in TF32. If `masked`, all queries meet all keys.
    """
    walk = walk_of(kernel, code, problem, masked)

    def slots(count: Callable[[Mix], int]) -> float:
        """Thread slots of the instructions that `count` selects, as a program executes them."""
        loops = count(code.loop) * walk.whole_tiles + count(code.tail) * walk.tail_steps
        return 32 * code.num_warps * (count(code.rest) + loops + count(code.taps) * code.n_taps)

    # The SM that finishes last decides the time, so the programs per SM are rounded up.
    rounds = -(-walk.programs // gpu.sms)
    issued = slots(Counter.total)
    passes, rate = (3, gpu.tf32_fma) if element_bytes == 4 else (1, gpu.half_fma)
    clocks = {
        "issue": issued / gpu.issue_slots,
        "exponential": slots(lambda mix: mix["exp"]) / gpu.exponentials,
        "matrix": passes * _multiply_adds(kernel, code, problem, walk) / rate,
    }
    bounds = {unit: rounds * n / gpu.clock for unit, n in clocks.items()}
    resident_warps = gpu.resident_warps(code.usage.registers, code.usage.shared_bytes, code.num_warps)
    return Cost(problem.useful_scores, walk.programs * issued, bounds, resident_warps)


def _multiply_adds(kernel: str, code: Analysis, problem: Problem, walk: Walk) -> float:
    """Multiply-adds of a program's matrix products, with the channels that a tile holds for a head."""
    shares = {kernel: walk.scores}
    if kernel == "small_map_backward":
        tile = code.block_m * code.block_n
        shares = {"key_value_gradient": tile * walk.whole_tiles, "query_gradient": tile * walk.tail_steps}
    widths = [*map(tiles.channel_block, problem.head_dims)]
    return sum(
        scores * sum(n * width for n, width in zip(_PRODUCTS[name], widths, strict=True))
        for name, scores in shares.items()
    )


def walk_of(kernel: str, code: Analysis, problem: Problem, masked: bool = False) -> Walk:
    """Programs and steps of an attention kernel; without a loop for the tail, the last step is a whole one.

    In a small map's backward, a program that owns queries and one that owns keys count as one. Its whole
    tiles are the steps over queries, which the program that owns keys takes. Its tail is the steps over keys,
    which the program that owns queries takes. The steps over queries have the larger loop, of four matrix
    products for a score instead of three, and `static_analysis.sections` finds that loop as `loop`.
    """
    grid, kv_tokens = problem.grid, problem.kv_grid.region_tokens
    regions, tokens = grid.n_regions, grid.region_tokens
    # The share of regions that hold more than padding. Programs of the others have no queries and do not
    # count, and dK/dV does not walk these regions.
    alive = -(-grid.height // grid.region_height) * -(-grid.width // grid.region_width) / regions
    if kernel.startswith("small_map"):
        keys, queries = (-(-problem.topk * each // code.block_n) for each in (kv_tokens, tokens))
        programs = problem.batch * regions * (problem.num_heads // code.num_warps)  # one warp per head
        if kernel == "small_map_backward":  # programs run for all regions, and take fewer steps on average
            whole, tail_steps = queries * alive, keys * alive
            return Walk(programs, whole, tail_steps, code.block_m * code.block_n * (whole + tail_steps))
        return Walk(round(programs * alive), keys, 0, code.block_m * code.block_n * keys)
    owns_keys = kernel == "key_value_gradient"
    own, step = (code.block_n, code.block_m) if owns_keys else (code.block_m, code.block_n)
    owned, walked = (kv_tokens, tokens) if owns_keys else (tokens, kv_tokens)
    length = problem.topk * walked  # in dK/dV a mean: on average `topk` regions choose a region
    if masked or problem.settings.chooses_all:
        regions, owned, length = 1, regions * owned, regions * walked
        alive = 1.0
    programs = problem.batch * problem.num_heads * regions * -(-owned // own)
    tail = code.block_tail or step
    whole, tail_steps = float(length // step), float(-(-(length % step) // tail))
    if owns_keys:
        whole, tail_steps = whole * alive, tail_steps * alive
    else:
        programs = round(programs * alive)
    return Walk(programs, whole, tail_steps, own * (whole * step + tail_steps * tail))
