"""Which of the compiled tile configurations becomes a table's entry, and the table made of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from bra_triton.bench.machine_code.cost_model import loop_cost
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.tuning.prediction import LEPE, Job, Outcome, cost, read_results, time_apart, versions
from bra_triton.bench.tuning.search_space import candidates, serves
from bra_triton.kernels.tiles.table import FORWARD, PLAIN, Entry, Key, Table, Tile, packaged

# Outcomes by Triton version and `Job.key`.
ByVersion = Mapping[str, Mapping[str, Outcome]]

# The model is no closer than this. Among costs within it the cheapest loop wins: it alone decides for lists
# longer than those of the problems that the costs are of.
TIED = 1.05
# Where ptxas has serialised a loop, every matrix instruction waits for the one before. The counts tell
# nothing of it, so that such a loop must be cheaper by this: a margin, not a measurement.
SERIALISED = 1.1
# Depths of the pipeline that are tried, the second one where nothing of the first fits.
STAGES = (3, 2)
# Of the forms that are not plain so many spill-free configurations are enough, looked for in such batches;
# in one batch alone where the plain kernel spills in every tile, since a form only adds to it.
FORM_ENOUGH, FORM_BATCH = 1, 2


@dataclass(frozen=True)
class Ranked:
    """One configuration of a size class.

    Attributes:
        tile: the configuration.
        cost: predicted `Cost.cost`, the dearest of all Triton versions it was compiled with.
        loops: `loop_cost` of a whole step, by Triton version.
        serialised: whether the loop is, under any version.
    """

    tile: Tile
    cost: float
    loops: Mapping[str, float]
    serialised: bool

    @property
    def handicapped_cost(self) -> float:
        """What it competes with."""
        return self.cost * (SERIALISED if self.serialised else 1)


def results_by_version(
    results: Mapping[Job, Outcome], folder: Path, arch: str
) -> dict[str, dict[str, Outcome]]:
    """Outcomes by Triton version and `Job.key`: the running one's, and others' that the folder holds."""
    here = {job.key: outcome for job, outcome in results.items() if job.arch == arch}
    known = {version: read_results(folder, version, arch) for version in versions(folder, arch)}
    return {version: found for version, found in (known | {triton.__version__: here}).items() if found}


def rank(key: Key, arch: str, by_version: ByVersion, spilling: bool = False) -> list[Ranked]:
    """Configurations that may serve `key`, cheapest first; none that spills under any Triton version.

    Where any of them was compiled with every version, those that were not are left out.

    Args:
        key: the entry.
        arch: architecture.
        by_version: what is known.
        spilling: take those that spill, too; a spill costs its instructions.
    """
    ranked = []
    for job in jobs_of([key], arch):
        outcomes = _outcomes(job, by_version)
        codes = {version: outcome.code for version, outcome in outcomes.items() if outcome.code}
        if not outcomes or not all(outcome.runs_on(arch, spilling) for outcome in outcomes.values()):
            continue
        loops = {version: loop_cost(code, HARDWARE[arch]) for version, code in codes.items()}
        dearest = max(cost(job, code, key.size) for code in codes.values())
        ranked.append(Ranked(job.tile, dearest, loops, any(code.serialised for code in codes.values())))
    # Smaller tiles read the other side more often than the costs tell; of the widest heads no others fit.
    ranked = [r for r in ranked if serves(r.tile, key.size)] or ranked
    confirmed = [r for r in ranked if len(r.loops) == len(by_version)]
    by_cost = sorted(confirmed or ranked, key=lambda r: (r.handicapped_cost, r.tile.num_warps))
    tied = [r for r in by_cost if r.handicapped_cost <= TIED * by_cost[0].handicapped_cost]
    tied.sort(key=lambda r: (r.serialised, max(r.loops.values())))
    return tied + by_cost[len(tied) :]


def best(key: Key, arch: str, by_version: ByVersion) -> Ranked | None:
    """What becomes the entry; the cheapest that spills where everything does, None where nothing compiled."""
    ranked = rank(key, arch, by_version) or rank(key, arch, by_version, spilling=True)
    if not ranked:
        return None
    first = ranked[0]
    if key.kernel != FORWARD or _fuses_lepe(key, arch, first.tile, by_version):
        return first
    return replace(first, tile=replace(first.tile, fuses_lepe=False))


def jobs_of(keys: Iterable[Key], arch: str, stages: Sequence[int] = STAGES) -> list[Job]:
    """All configurations worth compiling for these entries, each once."""
    return list(
        dict.fromkeys(
            _job(key, arch, tile)
            for key in keys
            for num_stages in stages
            for tile in candidates(key.kernel, key.bits, key.head_dim, num_stages)
            if tile.own <= key.size
        )
    )


def jobs_of_forms(keys: Iterable[Key], arch: str, by_version: ByVersion) -> list[Job]:
    """What to compile next for the entries that are not plain: the best plain ones, a few at a time."""
    jobs = []
    for key in keys:
        if key.form == PLAIN or len(rank(key, arch, by_version)) >= FORM_ENOUGH:
            continue
        plain = replace(key, form=PLAIN)
        ranked = rank(plain, arch, by_version)
        ranked = ranked or rank(plain, arch, by_version, spilling=True)[:FORM_BATCH]
        forms = [_job(key, arch, each.tile) for each in ranked]
        jobs += [job for job in forms if not _outcomes(job, by_version)][:FORM_BATCH]
    return list(dict.fromkeys(jobs))


def jobs_of_lepe(keys: Iterable[Key], arch: str, by_version: ByVersion) -> list[Job]:
    """What to compile to know whether LePE is better fused into the forward."""
    found = ((key, best(key, arch, by_version)) for key in keys if key.kernel == FORWARD)
    pairs = (_apart(key, arch, ranked.tile) for key, ranked in found if ranked)
    return list(dict.fromkeys(job for pair in pairs for job in pair))


def best_jobs(keys: Iterable[Key], arch: str, by_version: ByVersion, count: int) -> list[Job]:
    """The `count` best of every entry: what another Triton version has to confirm."""
    return list(
        dict.fromkeys(
            _job(key, arch, ranked.tile) for key in keys for ranked in rank(key, arch, by_version)[:count]
        )
    )


def table(keys: Sequence[Key], arch: str, by_version: ByVersion) -> tuple[Table, list[Key]]:
    """The table of `arch` with the best configuration of every entry, and the entries that all spill.

    Entries of which nothing compiles, those that were measured, and those not asked for, stay as the shipped
    table has them.
    """
    entries = dict(packaged(arch).entries)
    for key in keys:
        was_measured = key in entries and entries[key].measured_on
        if not was_measured and (ranked := best(key, arch, by_version)):
            entries[key] = Entry(ranked.tile, round(ranked.cost, 2))
    versions = ", ".join(sorted(by_version))
    torch_version = re.sub(r"\+.*", "", torch.__version__)
    made = Table(arch, "predicted", torch_version, versions, entries)
    return made, [key for key in keys if not rank(key, arch, by_version)]


def _job(key: Key, arch: str, tile: Tile) -> Job:
    return Job(arch, key.kernel, key.bits, key.head_dim, tile, key.form)


def _outcomes(job: Job, by_version: ByVersion) -> dict[str, Outcome]:
    return {version: found[job.key] for version, found in by_version.items() if job.key in found}


def _apart(key: Key, arch: str, tile: Tile) -> tuple[Job, Job]:
    """The forward without LePE, and LePE in a launch of its own, whose tile no table has."""
    bare = _job(key, arch, replace(tile, fuses_lepe=False))
    return bare, replace(bare, kernel=LEPE, tile=Tile(64, 32, 4, 2, fuses_lepe=False))


def _fuses_lepe(key: Key, arch: str, tile: Tile, by_version: ByVersion) -> bool:
    """Whether LePE is better fused; so wherever two launches are not clearly predicted to be faster."""
    jobs = (_job(key, arch, tile), *_apart(key, arch, tile))
    ratios = []
    for found in by_version.values():
        codes = [found[job.key].code for job in jobs if job.key in found]
        if len(codes) == len(jobs) and all(codes):
            ratios.append(time_apart(jobs[0], codes, key.size))
    return not ratios or max(ratios) * TIED > 1
