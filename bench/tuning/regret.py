"""How much is lost by taking the tile that the cost model puts first: it against what a GPU has timed.

    python -m bra_triton.bench.tuning.regret docs/measured/h200-timings.jsonl

Needs no GPU, but the timings that `bra-autotune` keeps on one (`timings.jsonl` in its cache). Compiles what
was timed, and prints for every problem the tile that the model prefers and how much longer it took than the
fastest; then the means, for other values of `hardware.LATENCY_WARPS`, too. 0 stands for issue slots alone.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bra_triton.bench.machine_code.cost_model import Cost, ProblemSizes, predict
from bra_triton.bench.machine_code.hardware import HARDWARE, LATENCY_WARPS, latency
from bra_triton.bench.machine_code.launches import Setting
from bra_triton.bench.tuning import timing
from bra_triton.bench.tuning.prediction import KERNEL_NAMES, Job, compile_all
from bra_triton.bench.tuning.timing import Trial
from bra_triton.kernels.tiles import Tile
from bra_triton.kernels.tiles import cache as tile_cache

VALUES = (0, 2, 4, 6, 8, 12, 16)
Group = tuple[Setting, torch.dtype, str]  # with the kernel: what configurations compete in


@dataclass(frozen=True)
class Timed:
    """One configuration: what it took, and what the model says of it."""

    trial: Trial
    milliseconds: float
    cost: Cost

    def ranked_by(self, latency_warps: float) -> float:
        """The model's figure, were `LATENCY_WARPS` that."""
        return self.cost.slots_per_useful_score * latency(self.cost.resident_warps, latency_warps)


def read(lines: Iterable[str]) -> dict[Trial, float]:
    """Milliseconds by trial, without those refused."""
    rows = map(json.loads, lines)
    found = {timing.parse_trial(row["trial"]): row["milliseconds"] for row in rows}
    return {trial: milliseconds for trial, milliseconds in found.items() if math.isfinite(milliseconds)}


def is_ranked(tile: Tile) -> bool:
    """Whether the model ranks such tiles; those with options are variants of one that it has put first."""
    return tile.fuses_lepe and not tile.exp_share


def judge(timings: Mapping[Trial, float], arch: str, compiled: Path, workers: int) -> list[Timed]:
    """What the model says of every trial that compiles without spills."""
    jobs = {trial: _job(trial, arch) for trial in timings}
    outcomes = compile_all(jobs.values(), compiled, workers)
    judged = []
    for trial, milliseconds in timings.items():
        outcome = outcomes[jobs[trial]]
        if outcome.code is not None and outcome.runs_on(arch):
            kernel, problem = KERNEL_NAMES[trial.kernel], _problem(trial.setting, trial.dtype.itemsize)
            judged.append(Timed(trial, milliseconds, predict(kernel, outcome.code, problem, HARDWARE[arch])))
    return judged


def preferred(judged: Iterable[Timed], latency_warps: float) -> dict[Group, Timed]:
    """What the model puts first of every group."""
    best: dict[Group, Timed] = {}
    for timed in judged:
        key = _group(timed.trial)
        if key not in best or timed.ranked_by(latency_warps) < best[key].ranked_by(latency_warps):
            best[key] = timed
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the losses; always returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("timings", type=Path, nargs="+", help="files that bra-autotune keeps")
    parser.add_argument("--arch", choices=HARDWARE, default="sm_90", help="of the card that timed")
    parser.add_argument("--compiled", type=Path, default=tile_cache.folder() / "compiled")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    lines = (line for path in options.timings for line in path.read_text().splitlines())
    timings = {trial: time for trial, time in read(lines).items() if is_ranked(trial.tile)}
    judged = judge(timings, options.arch, options.compiled, options.workers)
    fastest: dict[Group, float] = {}
    for trial, milliseconds in timings.items():
        key = _group(trial)
        fastest[key] = min(milliseconds, fastest.get(key, math.inf))
    print(f"{len(timings)} configurations timed, {len(judged)} of them compile without spills")
    for (setting, dtype, kernel), timed in preferred(judged, LATENCY_WARPS).items():
        lost = timed.milliseconds / fastest[setting, dtype, kernel] - 1
        shape = f"{setting.batch}x{setting.height}x{setting.width}x{setting.dim} topk {setting.topk}"
        print(f"{shape} {dtype} {kernel}: {timed.trial.tile}, {lost:.1%} over the fastest")
    for value in sorted({*VALUES, LATENCY_WARPS}):
        first = preferred(judged, value).items()
        ratios = [timed.milliseconds / fastest[key] for key, timed in first]
        mean = statistics.geometric_mean(ratios) - 1
        print(f"LATENCY_WARPS {value:2}: {mean:.1%} on average, {max(ratios) - 1:.1%} at most")
    return 0


def _group(trial: Trial) -> Group:
    return trial.setting, trial.dtype, trial.kernel


def _job(trial: Trial, arch: str) -> Job:
    key = trial.key
    return Job(arch, key.kernel, key.bits, key.head_dim, trial.tile, key.form)


def _problem(s: Setting, element_bytes: int) -> ProblemSizes:
    tokens, heads = s.grid.region_tokens, (s.num_heads, s.qk_head_dim, s.v_head_dim)
    sizes = ProblemSizes(s.batch, s.grid.n_regions, tokens, s.topk, tokens, *heads, element_bytes)
    return sizes.merged() if s.chooses_all else sizes


if __name__ == "__main__":
    raise SystemExit(main())
