"""What a tile configuration is predicted to cost, from machine code: no GPU needed.

Configurations are compiled in processes of their own, every result is kept in a folder, and the cost model
makes a cost of it, a size class's problems together.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from bra_triton.bench.machine_code.analysis import Analysis, Result, analyse_each
from bra_triton.bench.machine_code.cost_model import lepe_apart_over_fused, predict
from bra_triton.bench.machine_code.hardware import HARDWARE, table_shared_bytes
from bra_triton.bench.machine_code.launches import record_attention
from bra_triton.bench.machine_code.static_analysis import KernelSpecimen, LoopMix, Usage
from bra_triton.bench.problems import Problem
from bra_triton.bench.tuning.search_space import problems
from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import Tile
from bra_triton.kernels.tiles.cache import source_digest

LEPE = "lepe"  # the convolution in a launch of its own: of a forward whose tile does not fuse it
KERNEL_NAMES = {
    LEPE: "lepe_forward",
    tiles.FORWARD: "attention_forward",
    tiles.QUERY_GRADIENT: "query_gradient",
    tiles.KEY_VALUE_GRADIENT: "key_value_gradient",
}
_DTYPES = {16: torch.float16, 32: torch.float32}


@dataclass(frozen=True)
class Job:
    """One configuration to compile.

    Attributes:
        arch: architecture.
        kernel: a key of `KERNEL_NAMES`.
        bits: of an element.
        head_dim: channels of a head.
        tile: the configuration.
        form: one of `tiles.FORMS`.
    """

    arch: str
    kernel: str
    bits: int
    head_dim: int
    tile: Tile
    form: str = tiles.PLAIN

    @property
    def key(self) -> str:
        """Its name in the cache of compile results."""
        form = "" if self.form == tiles.PLAIN else f" {self.form}"
        return f"{self.kernel} fp{self.bits} head {self.head_dim} {self.tile}{form}"


@dataclass(frozen=True)
class Outcome:
    """What compiling one configuration came to.

    Attributes:
        code: the counted machine code; None if it did not compile, or has no loop of matrix instructions.
        error: why there is none.
    """

    code: Analysis | None
    error: str = ""

    def runs_on(self, arch: str, spilling: bool = False) -> bool:
        """Whether it compiled, fits the card's shared memory and, unless `spilling`, spills nothing."""
        if self.code is None:
            return False
        usage = self.code.usage
        keeps = spilling or not (usage.spills or usage.stack_bytes)
        return keeps and usage.shared_bytes <= table_shared_bytes(arch)


def cost(job: Job, code: Analysis, size: int) -> float:
    """`Cost.cost`: the geometric mean over the problems of a size class."""
    return _geometric_mean(
        predict(KERNEL_NAMES[job.kernel], code, problem, HARDWARE[job.arch], job.bits // 8).cost
        for problem in problems(size, job.head_dim)
    )


def time_apart(job: Job, codes: tuple[Analysis, Analysis, Analysis], size: int) -> float:
    """Predicted time of a forward and LePE in two launches over that in one: the mean as in `cost`."""
    return _geometric_mean(
        lepe_apart_over_fused(codes, problem, HARDWARE[job.arch], job.bits // 8)
        for problem in problems(size, job.head_dim)
    )


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def compile_all(jobs: Iterable[Job], folder: Path, workers: int = 2) -> dict[Job, Outcome]:
    """Compiles what the folder does not hold yet, in processes of their own, and keeps every result.

    Args:
        jobs: of one architecture.
        folder: results of earlier runs, `<Triton's version>-<arch>.jsonl`, which this run continues.
        workers: processes; 1 compiles in this one.
    """
    jobs = list(dict.fromkeys(jobs))
    results: dict[Job, Outcome] = {}
    for arch in dict.fromkeys(job.arch for job in jobs):
        known = read_results(folder, triton.__version__, arch)
        results |= {job: known[job.key] for job in jobs if job.arch == arch and job.key in known}
    missing = [job for job in jobs if job not in results]
    folder.mkdir(parents=True, exist_ok=True)
    todo = [(specimen(job), job.arch) for job in missing]
    for done, (index, result) in enumerate(analyse_each(todo, workers), 1):
        job, outcome = missing[index], _judge(missing[index], result)
        results[job] = outcome
        row = {"source": _source(job.kernel), "key": job.key, **asdict(outcome)}
        with results_path(folder, triton.__version__, job.arch).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"\r{done}/{len(missing)} {job.key:<60}", end="", file=sys.stderr, flush=True)
    if missing:
        print(file=sys.stderr)
    return results


def results_path(folder: Path, version: str, arch: str) -> Path:
    """File of one Triton version's results for one architecture."""
    return folder / f"{version}-{arch}.jsonl"


def read_results(folder: Path, version: str, arch: str) -> dict[str, Outcome]:
    """Results by `Job.key` that an earlier run kept, of the kernels as they are now."""
    path, results = results_path(folder, version, arch), {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            if row["source"] == _source(row["key"].split()[0]):
                results[row["key"]] = _outcome(row)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was stopped
    return results


def _source(kernel: str) -> str:
    """Digest of a kernel's source; the forward's includes LePE's."""
    return source_digest(tiles.FORWARD if kernel == LEPE else kernel)


def versions(folder: Path, arch: str) -> list[str]:
    """Triton versions that the folder has results of."""
    return [path.name.removesuffix(f"-{arch}.jsonl") for path in sorted(folder.glob(f"*-{arch}.jsonl"))]


def specimen(job: Job) -> KernelSpecimen:
    """The kernel as a launch would give it to the compiler: the job's tile, and all that its form adds."""
    forced = tiles.FORWARD if job.kernel == LEPE else job.kernel
    side = 80 if job.form == tiles.PLAIN else 79
    routing_weight = "soft" if job.form == tiles.WEIGHTED else "none"
    problem = Problem("", 2, side, side, 2 * job.head_dim, 2, 8, 4, routing_weight)
    with tiles.use_tiles({forced: job.tile}):
        launched = record_attention(problem, _DTYPES[job.bits])
    return next(x.specimen for x in launched if x.specimen.name == KERNEL_NAMES[job.kernel])


def _judge(job: Job, result: Result) -> Outcome:
    if isinstance(result, Exception):
        return Outcome(None, f"{type(result).__name__}: {result}"[:200])
    if result.loop is None and job.kernel != LEPE:
        return Outcome(None, "no loop of matrix instructions")
    return Outcome(result)


def _outcome(row: dict[str, Any]) -> Outcome:
    code = row["code"]
    if code is not None:
        mixes = {name: LoopMix(**code[name]) for name in ("loop", "tail", "taps", "rest") if code[name]}
        code = Analysis(**(code | mixes | {"usage": Usage(**code["usage"])}))
    return Outcome(code, row["error"])
