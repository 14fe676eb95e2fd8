"""From instruction counts to predicted time: pure arithmetic on what the compiler produced.

A program (thread block) is taken to execute its straight-line code once, and its loops as often as the
problem says:

    warp instructions = rest + whole tiles x loop + tail steps x tail + taps x (one tap of LePE)

Predicated instructions count as executed, and rows of dK/dV have the mean length. Bounds suppose that nothing
but the unit in question costs time, at documented peak rates; latency and caches are left out. What tiles
compete with (`Cost.cost`) counts latency by `hardware.LATENCY_WARPS`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bra_triton.bench.machine_code.hardware import Hardware, latency
from bra_triton.bench.machine_code.static_analysis import Analysis, Mix
from bra_triton.bench.problems import Problem
from bra_triton.kernels import tiles

# Multiply-adds of the matrix products for one score, in query/key channels and in value channels.
_PRODUCTS = {
    "attention_forward": (1, 1),
    "query_gradient": (2, 1),
    "key_value_gradient": (2, 2),
    "small_map_forward": (1, 1),
    "small_map_backward": (4, 3),  # a score is computed by a query's and by a key's program
}


class Walk(NamedTuple):
    """How an attention kernel cuts a problem into programs and steps."""

    programs: int  # thread blocks of the launch
    whole_tiles: float  # steps of a program over whole tiles, on average
    tail_steps: float  # narrower steps that follow, masked
    scores: float  # that a program computes, masked ones and those past the region's end included


@dataclass(frozen=True)
class Cost:
    """Prediction for one launch of an attention kernel."""

    useful_scores: int  # `Problem.useful_scores`
    issue_slots: float  # thread instruction slots, all programs
    bounds: dict[str, float]  # seconds by unit: issue, exponential, matrix
    resident_warps: int  # an SM; 0 where a block does not fit

    @property
    def slots_per_useful_score(self) -> float:
        """Issue slots of the whole kernel for one useful score."""
        return self.issue_slots / self.useful_scores

    @property
    def cost(self) -> float:
        """What configurations compete with: `slots_per_useful_score`, and the time that warps wait."""
        return self.slots_per_useful_score * latency(self.resident_warps)


def predict(
    kernel: str,
    code: Analysis,
    problem: Problem,
    hardware: Hardware,
    element_bytes: int = 2,
    masked: bool = False,
) -> Cost:
    """Predicts a launch of an attention kernel, one that `_PRODUCTS` names, from its counted code.

    Products of elements of 4 bytes are three of TF32 each; `masked` says that all queries meet all keys.
    """
    walk = walk_of(kernel, code, problem, masked)

    def slots(count: Callable[[Mix], int]) -> float:
        """Thread slots of some kind of instruction that a program executes."""
        loops = count(code.loop) * walk.whole_tiles + count(code.tail) * walk.tail_steps
        return 32 * code.num_warps * (count(code.rest) + loops + count(code.taps) * code.n_taps)

    # The last SM to finish decides, so work counts in whole programs an SM.
    rounds = -(-walk.programs // hardware.sms)
    issued = slots(Counter.total)
    passes, rate = (3, hardware.tf32_fma) if element_bytes == 4 else (1, hardware.half_fma)
    # Multiply-adds for one score, of heads as wide as their tiles.
    widths = map(tiles.channel_block, problem.head_dims)
    products = sum(n * width for n, width in zip(_PRODUCTS[kernel], widths, strict=True))
    clocks = {
        "issue": issued / hardware.issue_slots,
        "exponential": slots(lambda mix: mix["exp"]) / hardware.exponentials,
        "matrix": walk.scores * passes * products / rate,
    }
    bounds = {unit: rounds * n / hardware.clock for unit, n in clocks.items()}
    registers, shared_bytes = code.usage.registers, code.usage.shared_bytes
    resident_warps = hardware.resident_warps(registers, shared_bytes, code.num_warps)
    return Cost(problem.useful_scores, walk.programs * issued, bounds, resident_warps)


def walk_of(kernel: str, code: Analysis, problem: Problem, masked: bool = False) -> Walk:
    """Programs and steps of an attention kernel; without a tail of its own the last step is a whole one.

    A small map's backward is taken for programs that own queries in whole tiles and keys in the tail.
    """
    grid, kv_tokens = problem.grid, problem.kv_grid.region_tokens
    regions, tokens = grid.n_regions, grid.region_tokens
    # Programs of regions that are padding alone walk nothing, and are left out; nor are they walked in dK/dV.
    alive = -(-grid.height // grid.region_height) * -(-grid.width // grid.region_width) / regions
    if kernel.startswith("small_map"):
        keys, queries = (-(-problem.topk * each // code.block_n) for each in (kv_tokens, tokens))
        programs = problem.batch * regions * (problem.num_heads // code.num_warps)  # a warp a head
        if kernel == "small_map_backward":  # whose programs of keys are all there, for fewer queries
            return Walk(programs, keys * alive, queries * alive, code.block_m * code.block_n * keys * alive)
        return Walk(round(programs * alive), keys, 0, code.block_m * code.block_n * keys)
    owns_keys = kernel == "key_value_gradient"
    own, step = (code.block_n, code.block_m) if owns_keys else (code.block_m, code.block_n)
    owned, walked = (kv_tokens, tokens) if owns_keys else (tokens, kv_tokens)
    length = problem.topk * walked  # of dK/dV on average: as many regions choose a region as it chooses
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
