"""The kernel report: what every kernel costs as it is shipped. Needs no GPU.

All of it is compiled and counted, or predicted from those counts (`machine_code/cost_model.py`); nothing is
measured. The exit status is 1 when a target is missed, when a shipped configuration does not compile, or when
one spills in float16 on sm_80 or sm_90.
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bra_triton.bench import report_tables
from bra_triton.bench.machine_code.analysis import Analysis, Result, analyse_all
from bra_triton.bench.machine_code.cost_model import Cost, predict
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.launches import Launch, record_attention
from bra_triton.bench.measure import DTYPES
from bra_triton.bench.problems import MODELS, MODES, Problem
from bra_triton.kernels import tiles
from bra_triton.kernels.routing.lists import ROUTED, SMALL_MAP

# Issue slots per score that the shipped loops may take, by kernel, architecture and head: float16, regions of
# TARGET_REGION_TOKENS and more. What the loop of plain dense attention took in the same tile (Triton 3.8, at
# commit fcc7952, which had such kernels to compile), times 1.08 in the forward and 1.12 in the gradients: the
# difference is what routing costs. The shipped loops took .93 to 1.09 times the dense ones.
TARGETS = {
    ("attention_forward", "sm_80", 32): 9.18,
    ("attention_forward", "sm_80", 64): 12.29,
    ("attention_forward", "sm_90", 32): 8.51,
    ("attention_forward", "sm_90", 64): 9.42,
    ("query_gradient", "sm_80", 32): 8.72,
    ("query_gradient", "sm_80", 64): 11.38,
    ("query_gradient", "sm_90", 32): 7.56,
    ("query_gradient", "sm_90", 64): 8.05,
    ("key_value_gradient", "sm_80", 32): 12.32,
    ("key_value_gradient", "sm_80", 64): 15.05,
    ("key_value_gradient", "sm_90", 32): 8.86,
    ("key_value_gradient", "sm_90", 64): 10.29,
}
TARGET_REGION_TOKENS = 100
CHECKED_ARCHITECTURES = ("sm_80", "sm_90")

REPORTED = MODELS | MODES


# The option `--form` of this report and of `kernel-times`.
FORM_OPTION: dict[str, Any] = {
    "choices": (ROUTED, SMALL_MAP),
    "help": "form of the attention; by default each problem's own",
}


@dataclass(frozen=True)
class Row:
    """One kernel of one problem on one architecture.

    Attributes:
        problem: name of the problem.
        arch: architecture.
        kernel: name of the kernel.
        programs: thread blocks of the launch.
        bytes_of_arguments: `Launch.bytes_of_arguments`.
        analysis: its counts; None when it does not compile.
        error: the compiler's, when it does not compile.
        checked: whether a spill is a failure.
        cost: prediction, for attention kernels.
        target: most issue slots per score of its loop; None where none is set.
    """

    problem: str
    arch: str
    kernel: str
    programs: int = 1
    bytes_of_arguments: int = 0
    analysis: Analysis | None = None
    error: str | None = None
    checked: bool = False
    cost: Cost | None = None
    target: float | None = None

    @property
    def bound(self) -> tuple[float, str]:
        """Seconds that the launch takes at least on the unit that binds, and the unit."""
        if self.cost is not None:
            return self.cost.bounds[self.cost.binding], self.cost.binding
        return self.bytes_of_arguments / HARDWARE[self.arch].bandwidth, "memory"

    @property
    def failures(self) -> list[str]:
        """What makes the report fail, in words."""
        where = f"{self.problem}, {self.arch}, {self.kernel}"
        if self.analysis is None:
            return [f"{where}: does not compile: {self.error}"]
        found = []
        if self.checked and self.analysis.usage.spills:
            found.append(f"{where}: {self.analysis.usage.spills} instructions spill")
        if self.target is not None and self.analysis.slots_per_score > self.target:
            slots = self.analysis.slots_per_score
            found.append(f"{where}: {slots:.2f} issue slots per score, target {self.target}")
        return found


def shipped(problem: Problem, dtype: torch.dtype, arch: str, form: str | None = None) -> list[Launch]:
    """What a forward and backward of a problem launches on an architecture, every kernel once."""
    with tiles.use_architecture(arch), in_form(form):
        launched = record_attention(problem, dtype)
    kernels = [launch.specimen for launch in launched]
    return [launch for i, launch in enumerate(launched) if launch.specimen not in kernels[:i]]


def in_form(form: str | None) -> AbstractContextManager[None]:
    """Context in which attentions have a form of `routing.lists`, or with None each its own."""
    return nullcontext() if form is None else tiles.use_form(form)


def target_of(kernel: str, problem: Problem, arch: str, dtype: str) -> float | None:
    """The most issue slots per score that an attention kernel may take; None where no target is set."""
    large = problem.grid.region_tokens >= TARGET_REGION_TOKENS and dtype == "float16"
    plain = problem.routing_weight == "none" and problem.kv_per_win is None
    return TARGETS.get((kernel, arch, problem.head_dim)) if plain and large else None


def collect(
    problems: Sequence[Problem],
    architectures: Sequence[str],
    dtype: str = "float16",
    workers: int = 1,
    form: str | None = None,
) -> list[Row]:
    """Compiles what the problems launch.

    Args:
        problems: what is launched.
        architectures: keys of `hardware.HARDWARE`.
        dtype: a key of `measure.DTYPES`.
        workers: processes that compile.
        form: of the attention, one of `routing.lists`; by default each problem's own.
    """
    launched = [
        (problem, arch, launch)
        for arch in architectures
        for problem in problems
        for launch in shipped(problem, DTYPES[dtype], arch, form)
    ]
    results = analyse_all([(launch.specimen, arch) for _, arch, launch in launched], workers)
    return [_row(*each, dtype, result) for each, result in zip(launched, results, strict=True)]


def _row(problem: Problem, arch: str, launch: Launch, dtype: str, result: Result) -> Row:
    kernel, analysis, cost = launch.specimen.name, None, None
    if isinstance(result, Analysis):
        analysis = result
        if analysis.loop is not None:
            sizes = (DTYPES[dtype].itemsize, launch.is_masked)
            cost = predict(kernel, analysis, problem, HARDWARE[arch], *sizes)
    return Row(
        problem.name,
        arch,
        kernel,
        launch.programs,
        launch.bytes_of_arguments,
        analysis,
        error=str(result) if isinstance(result, Exception) else None,
        checked=dtype == "float16" and arch in CHECKED_ARCHITECTURES,
        cost=cost,
        target=target_of(kernel, problem, arch, dtype),
    )


def as_json(rows: Sequence[Row]) -> list[dict]:
    """The rows as plain data."""
    result = []
    for row in rows:
        result.append(asdict(row) | {"bound": row.bound, "failures": row.failures})
        if row.cost is not None and row.analysis is not None:
            result[-1]["slots_per_score"] = row.analysis.slots_per_score
            result[-1]["slots_per_useful_score"] = row.cost.slots_per_useful_score
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser("bra-bench report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=HARDWARE, default=list(CHECKED_ARCHITECTURES))
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--problem", nargs="+", choices=REPORTED, default=list(REPORTED))
    parser.add_argument("--form", **FORM_OPTION)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    problems = [REPORTED[name] for name in options.problem]
    rows = collect(problems, options.arch, options.dtype, options.workers, options.form)
    if options.json:
        options.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    print(report_tables.render(rows, options.markdown))
    failures = [failure for row in rows for failure in row.failures]
    print(*failures or ["All targets are met, and nothing spills where that is checked."], sep="\n")
    return 1 if failures else 0
