"""Predicts the best tile configuration of each entry of a table, from machine code; no GPU is needed.

Configurations are compiled, the cost model predicts the cost of each on the problems of a size class, and the
cheapest becomes the entry. Triton caches what it has compiled, so a run that was stopped soon catches up.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import geometric_mean
from typing import NamedTuple

import torch
import triton

from bra_triton.bench.machine_code.cost_model import predict
from bra_triton.bench.machine_code.hardware import HARDWARE, latency, table_shared_bytes
from bra_triton.bench.machine_code.launches import KERNEL_NAMES, launch_with
from bra_triton.bench.machine_code.static_analysis import Analysis, Result, analyse, in_processes
from bra_triton.bench.problems import Problem
from bra_triton.bench.tuning.search_space import candidates, problems, serves
from bra_triton.kernels import tiles
from bra_triton.kernels.plan import Launch
from bra_triton.kernels.tiles import PLAIN, Key, Tile
from bra_triton.kernels.tiles.table import Entry, Table, packaged

# The model is not more exact than this factor. Among configurations whose costs differ by less, the one with
# the cheapest loop wins: only the loop matters for lists longer than those of the problems used here.
TIED = 1.05
# If ptxas has serialised a loop, every matrix instruction waits for the one before it. The counts do not show
# this, so such a loop must be cheaper by this factor to win. The factor is a margin, not a measurement.
SERIALISED = 1.1
# Pipeline depths that are tried; the second one only if no configuration with the first fits.
STAGES = (3, 2)
# For a form that is not plain, one configuration without spills is enough: FORM_BATCH are compiled at a time
# until there is one. If the plain kernel always spills, only one batch is tried: forms need more registers.
FORM_BATCH = 2


class Job(NamedTuple):
    """One configuration to compile."""

    key: Key  # with the largest size for all sizes: the code does not depend on it
    tile: Tile

    @classmethod
    def of(cls, key: Key, tile: Tile) -> "Job":
        """The job that compiles `tile` for an entry, whatever its size."""
        return cls(replace(key, size=tiles.SIZES[-1]), tile)


class Ranked(NamedTuple):
    """One configuration of a size class: the cost that it is ranked by, and its predicted cost."""

    tile: Tile
    competing: float
    cost: float
    loop: float  # cost of the loop alone
    serialised: bool


Results = dict[Job, Result]


def predict_table(keys: Sequence[Key], arch: str, workers: int) -> tuple[Table, list[Key]]:
    """Compiles what is worth trying for the entries, in `workers` processes; returns what `table` does."""
    results: Results = {}

    def compile_all(jobs: Iterable[Job]) -> None:
        results.update(
            in_processes(analyse, {job: (launch_of(job), arch) for job in dict.fromkeys(jobs)}, workers)
        )

    plain = [key for key in keys if key.form == PLAIN]
    compile_all(jobs_of(plain, STAGES[:1]))
    compile_all(jobs_of([key for key in plain if not rank(key, arch, results)], STAGES[1:]))
    while more := jobs_of_forms(keys, arch, results):
        compile_all(more)
    return table(keys, arch, results)


def jobs_of(keys: Iterable[Key], stages: Sequence[int] = STAGES) -> list[Job]:
    """All configurations worth compiling for these entries."""
    return [
        Job.of(key, tile)
        for key in keys
        for num_stages in stages
        for tile in candidates(key.kernel, key.bits, key.head_dim, num_stages)
        if tile.own <= key.size
    ]


def jobs_of_forms(keys: Iterable[Key], arch: str, results: Results) -> list[Job]:
    """What to compile next for entries that are not plain: the best tiles of plain ones, a few at a time."""
    jobs = []
    for key in keys:
        if key.form == PLAIN or rank(key, arch, results):
            continue
        as_plain = replace(key, form=PLAIN)
        ranked = rank(as_plain, arch, results) or rank(as_plain, arch, results, spilling=True)[:FORM_BATCH]
        forms = [Job.of(key, plain.tile) for plain in ranked]
        jobs += [job for job in forms if job not in results][:FORM_BATCH]
    return jobs


def launch_of(job: Job) -> Launch:
    """The launch whose kernel is compiled: with the job's tile, for a problem of the job's form."""
    key = job.key
    side = 80 if key.form == PLAIN else 79
    routing_weight = "soft" if key.form == tiles.WEIGHTED else "none"
    problem = Problem("", 2, side, side, 2 * key.head_dim, 2, 8, 4, routing_weight)
    dtype = torch.float16 if key.bits == 16 else torch.float32
    return launch_with(job.tile, key.kernel, problem, dtype)


def rank(key: Key, arch: str, results: Results, spilling: bool = False) -> list[Ranked]:
    """Configurations that may serve `key`, cheapest first; those that spill only if `spilling`.

    The cost of a spill is that of its instructions, without the time that memory takes.
    """
    hardware, most_shared, ranked = HARDWARE[arch], table_shared_bytes(arch), []
    for job in jobs_of([key]):
        code = results.get(job)
        if not isinstance(code, Analysis) or not code.loop:
            continue
        spills = code.usage.spills or code.usage.stack_bytes
        if code.usage.shared_bytes > most_shared or (spills and not spilling):
            continue
        costs = [
            predict(KERNEL_NAMES[key.kernel], code, problem, hardware, key.bits // 8)
            for problem in problems(key.size, key.head_dim)
        ]
        mean = geometric_mean(cost.cost for cost in costs)
        competing = mean * (SERIALISED if code.serialised else 1)
        loop = code.slots_per_score * latency(costs[0].resident_warps)
        ranked.append(Ranked(job.tile, competing, mean, loop, code.serialised))
    # Tiles that are too small read the other side more often than the costs show; the widest heads need them.
    ranked = [each for each in ranked if serves(each.tile, key.size)] or ranked
    by_cost = sorted(ranked, key=lambda each: (each.competing, each.tile.num_warps))
    tied = [each for each in by_cost if each.competing <= TIED * by_cost[0].competing]
    return sorted(tied, key=lambda each: (each.serialised, each.loop)) + by_cost[len(tied) :]


def table(keys: Sequence[Key], arch: str, results: Results) -> tuple[Table, list[Key]]:
    """The table of `arch` with the best configuration of every entry, and the entries where all spill.

    If all configurations of an entry spill, the cheapest of them becomes the entry. An entry stays as in the
    shipped table if nothing compiles, if it was measured, or if it is not in `keys`. Whether a forward fuses
    LePE also stays: this and a separate launch differ by a few percent, which only timing can tell.
    """
    entries = dict(packaged(arch).entries)
    spilling = []
    for key in keys:
        ranked = rank(key, arch, results)
        if not ranked:
            spilling.append(key)
            ranked = rank(key, arch, results, spilling=True)
        known = entries.get(key)
        if ranked and not (known and known.measured_on):
            fuses = known is None or known.tile.fuses_lepe
            entries[key] = Entry(replace(ranked[0].tile, fuses_lepe=fuses), round(ranked[0].cost, 2))
    torch_version = re.sub(r"\+.*", "", torch.__version__)
    return Table(arch, "predicted", torch_version, triton.__version__, entries), spilling
