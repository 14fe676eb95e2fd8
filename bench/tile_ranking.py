"""Which of the compiled tile configurations becomes a table's entry, and the table made of them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from bra_triton.bench.search_space import candidates, serves
from bra_triton.bench.tile_prediction import Job, Outcome, cost, read_results, versions
from bra_triton.kernels.tile_table import Entry, Key, Table, Tile, packaged

# The model is no closer than this. Among costs within it the cheapest loop wins: it alone decides for lists
# longer than those of the problems that the costs are of.
TIED = 1.05
# Depths of the pipeline that are tried, the second one where nothing of the first fits.
STAGES = (3, 2)


@dataclass(frozen=True)
class Ranked:
    """One configuration of a size class.

    Attributes:
        tile: the configuration.
        cost: predicted issue slots a useful score, the dearest of all Triton versions it was compiled with.
        slots: issue slots of the loop for one score of a whole step, by Triton version.
    """

    tile: Tile
    cost: float
    slots: Mapping[str, float]


def results_by_version(
    results: Mapping[Job, Outcome], folder: Path, arch: str
) -> dict[str, dict[str, Outcome]]:
    """Outcomes by Triton version and `Job.key`: the running one's, and others' that the folder holds."""
    here = {job.key: outcome for job, outcome in results.items() if job.arch == arch}
    known = {version: read_results(folder, version, arch) for version in versions(folder, arch)}
    return {version: found for version, found in (known | {triton.__version__: here}).items() if found}


def rank(key: Key, arch: str, by_version: Mapping[str, Mapping[str, Outcome]]) -> list[Ranked]:
    """Configurations that may serve `key`, cheapest first; none that spills under any Triton version.

    Where any of them was compiled with every version, those that were not are left out.
    """
    ranked = []
    for job in _jobs([key], arch, STAGES):
        tile = job.tile
        if tile.own > key.size:
            continue
        outcomes = {v: found[job.key] for v, found in by_version.items() if job.key in found}
        codes = {version: outcome.code for version, outcome in outcomes.items() if outcome.code}
        if not outcomes or not all(outcome.runs_on(arch) for outcome in outcomes.values()):
            continue
        slots = {version: code.slots_per_score for version, code in codes.items()}
        dearest = max(cost(job, code, key.size) for code in codes.values())
        ranked.append(Ranked(tile, dearest, slots))
    # Smaller tiles read the other side more often than the costs tell; of the widest heads no others fit.
    ranked = [r for r in ranked if serves(r.tile, key.size)] or ranked
    confirmed = [r for r in ranked if len(r.slots) == len(by_version)]
    by_cost = sorted(confirmed or ranked, key=lambda r: (r.cost, r.tile.num_warps))
    tied = [r for r in by_cost if r.cost <= TIED * by_cost[0].cost]
    tied.sort(key=lambda r: max(r.slots.values()))
    return tied + by_cost[len(tied) :]


def jobs_of(keys: Iterable[Key], arch: str, num_stages: int = STAGES[0]) -> list[Job]:
    """All configurations worth compiling for these entries, each once."""
    return list(dict.fromkeys(_jobs(keys, arch, (num_stages,))))


def best_jobs(
    keys: Iterable[Key], arch: str, by_version: Mapping[str, Mapping[str, Outcome]], count: int
) -> list[Job]:
    """The `count` best of every entry: what another Triton version has to confirm."""
    return list(
        dict.fromkeys(
            Job(arch, key.kernel, key.bits, key.head_dim, ranked.tile)
            for key in keys
            for ranked in rank(key, arch, by_version)[:count]
        )
    )


def table(
    keys: Sequence[Key], arch: str, by_version: Mapping[str, Mapping[str, Outcome]]
) -> tuple[Table, list[Key]]:
    """The table of `arch` with the best configuration of every entry, and the entries that have none.

    Those, and entries not asked for, stay as the shipped table has them.
    """
    found = {key: rank(key, arch, by_version) for key in keys}
    entries = dict(packaged(arch).entries)
    for key, ranked in found.items():
        if ranked:
            entries[key] = Entry(ranked[0].tile, round(ranked[0].cost, 2))
    versions = ", ".join(sorted(by_version))
    torch_version = re.sub(r"\+.*", "", torch.__version__)
    made = Table(arch, "predicted", torch_version, versions, entries)
    return made, [key for key, ranked in found.items() if not ranked]


def _jobs(keys: Iterable[Key], arch: str, stages: tuple[int, ...]) -> Iterator[Job]:
    for key in keys:
        for num_stages in stages:
            for tile in candidates(key.kernel, key.bits, key.head_dim, num_stages):
                yield Job(arch, key.kernel, key.bits, key.head_dim, tile)
