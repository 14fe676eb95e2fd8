"""The kernel report: what every kernel costs as it is shipped. Needs no GPU.

All of it is compiled and counted, or predicted from those counts (`machine_code/cost_model.py`); nothing is
measured. The exit status is 1 when a target is missed, when a shipped configuration does not compile, or when
one spills in float16 on sm_80 or sm_90.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bra_triton.bench.machine_code.analysis import Analysis, analyse_all
from bra_triton.bench.machine_code.cost_model import Cost, predict
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.launches import Launch, record_attention
from bra_triton.bench.measure import DTYPES
from bra_triton.bench.problems import MODELS, MODES, Problem
from bra_triton.bench.tables import table
from bra_triton.kernels import tiles
from bra_triton.kernels.routing.lists import ROUTED, SMALL_MAP

# Issue slots per score that the shipped loops may take, by kernel, architecture and head: float16, regions of
# TARGET_REGION_TOKENS and more. What the loop of plain dense attention took in the same tile (Triton 3.8, at
# commit fcc7952, which had such kernels to compile), times 1.08 in the forward and 1.12 in the gradients: the
# difference is what routing costs. The shipped loops took .93 to 1.09 times the dense ones. Two of sm_90 may
# take more, because the tile that was the fastest on an H100 does: an eighth of the exponentials by
# multiply-adds (forward, heads of 64), five stages (dK/dV, heads of 32).
TARGETS = {
    ("attention_forward", "sm_80", 32): 9.18,
    ("attention_forward", "sm_80", 64): 12.29,
    ("attention_forward", "sm_90", 32): 8.51,
    ("attention_forward", "sm_90", 64): 9.75,
    ("query_gradient", "sm_80", 32): 8.72,
    ("query_gradient", "sm_80", 64): 11.38,
    ("query_gradient", "sm_90", 32): 7.56,
    ("query_gradient", "sm_90", 64): 8.05,
    ("key_value_gradient", "sm_80", 32): 12.32,
    ("key_value_gradient", "sm_80", 64): 15.05,
    ("key_value_gradient", "sm_90", 32): 8.95,
    ("key_value_gradient", "sm_90", 64): 10.29,
}
TARGET_REGION_TOKENS = 100
CHECKED_ARCHITECTURES = ("sm_80", "sm_90")

REPORTED = MODELS | MODES


# Columns of the instruction mix; the rest of the loop's instructions are summed up as "other".
_MIX = {"exp": "exponentials", "matrix": "matrix", "fp32": "fp32", "int": "integer", "loads": "global_loads"}

_NOTES = """\
Compiled and counted, or predicted from the counts; nothing is measured. Issue slots: warp instructions x 32.
slots/score: of the loop over whole tiles; a star: ptxas has serialised its matrix instructions (each waits).
in flight: copies of later steps that a step does not wait for; 0: every step waits for all of its own.
slots/useful: whole kernel, padding of tiles, list tail, prologue and epilogue included, over the scores that
count; every loop as often as the problem runs it.
Bounds are microseconds a launch at peak rates, each as if nothing else took time.
Other kernels: code is all their instructions; MB what their tensor arguments hold, each once (a launch that
reads a part of a packed map moves less); memory us the time of those bytes."""


@dataclass(frozen=True)
class Row:
    """One kernel of one problem on one architecture."""

    problem: Problem
    dtype: str
    arch: str
    kernel: str
    programs: int = 1  # thread blocks of the launch
    bytes_of_arguments: int = 0
    analysis: Analysis | None = None  # its counts; None when it does not compile
    error: str | None = None  # the compiler's, when it does not compile
    cost: Cost | None = None  # prediction, for attention kernels

    @property
    def bound(self) -> tuple[float, str]:
        """Seconds that the launch takes at least on the unit that binds, and the unit."""
        if self.cost is not None:
            return self.cost.bounds[self.cost.binding], self.cost.binding
        return self.bytes_of_arguments / HARDWARE[self.arch].bandwidth, "memory"

    @property
    def target(self) -> float | None:
        """The most issue slots per score that its loop may take; None where no target is set."""
        problem = self.problem
        large = problem.grid.region_tokens >= TARGET_REGION_TOKENS and self.dtype == "float16"
        plain = problem.routing_weight == "none" and problem.kv_per_win is None
        return TARGETS.get((self.kernel, self.arch, problem.head_dim)) if plain and large else None

    @property
    def failures(self) -> list[str]:
        """What makes the report fail, in words."""
        where = f"{self.problem.name}, {self.arch}, {self.kernel}"
        if self.analysis is None:
            return [f"{where}: does not compile: {self.error}"]
        found, spills = [], self.analysis.usage.spills
        if spills and self.dtype == "float16" and self.arch in CHECKED_ARCHITECTURES:
            found.append(f"{where}: {spills} instructions spill")
        if self.target is not None and self.analysis.slots_per_score > self.target:
            slots = self.analysis.slots_per_score
            found.append(f"{where}: {slots:.2f} issue slots per score, target {self.target}")
        return found


def shipped(problem: Problem, dtype: torch.dtype, arch: str, form: str | None = None) -> list[Launch]:
    """What a forward and backward of a problem launches on an architecture, every kernel once."""
    with tiles.use_architecture(arch), tiles.use_form(form):
        launched = record_attention(problem, dtype)
    kernels = [launch.specimen for launch in launched]
    return [launch for i, launch in enumerate(launched) if launch.specimen not in kernels[:i]]


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
    rows = []
    for (problem, arch, launch), result in zip(launched, results, strict=True):
        kernel, cost = launch.specimen.name, None
        launch_sizes = (launch.programs, launch.bytes_of_arguments)
        if isinstance(result, Exception):
            rows.append(Row(problem, dtype, arch, kernel, *launch_sizes, error=str(result)))
            continue
        if result.loop is not None:
            sizes = (DTYPES[dtype].itemsize, launch.is_masked)
            cost = predict(kernel, result, problem, HARDWARE[arch], *sizes)
        rows.append(Row(problem, dtype, arch, kernel, *launch_sizes, result, cost=cost))
    return rows


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    result = []
    for row in rows:
        derived = {"bound": row.bound, "target": row.target, "failures": row.failures}
        result.append(asdict(row) | derived | {"problem": row.problem.name})
        if row.cost is not None and row.analysis is not None:
            result[-1]["slots_per_score"] = row.analysis.slots_per_score
            result[-1]["slots_per_useful_score"] = row.cost.slots_per_useful_score
    return result


def render(rows: Sequence[Row], markdown: bool = False) -> str:
    """The whole report, of any number of architectures, as text or Markdown."""
    parts = [_NOTES]
    for arch in dict.fromkeys(row.arch for row in rows):
        here = [row for row in rows if row.arch == arch and row.analysis is not None]
        attention, others = ([row for row in here if (row.cost is None) == is_other] for is_other in (0, 1))
        name = f"{arch} ({HARDWARE[arch].gpu})"
        parts += [
            table(f"{name}: attention kernels, loops", [*map(_loop_cells, attention)], markdown),
            table(f"{name}: attention kernels, launches", [*map(_launch_cells, attention)], markdown),
            table(f"{name}: other kernels", [*map(_other_cells, others)], markdown),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _named(row: Row, tile: bool = False) -> dict[str, object]:
    """The columns that say what a row is about, and what its kernel occupies."""
    assert row.analysis is not None
    code, usage = row.analysis, row.analysis.usage
    return {
        "problem": row.problem.name,
        "kernel": row.kernel,
        **({"M x N, warps": f"{code.block_m}x{code.block_n}, {code.num_warps}"} if tile else {}),
        "registers": usage.registers,
        "shared": f"{usage.shared_bytes / 1024:.1f} K",
        "spills": usage.spills,
        "warps/SM": HARDWARE[row.arch].resident_warps(usage.registers, usage.shared_bytes, code.num_warps),
    }


def _loop_cells(row: Row) -> dict[str, object]:
    code = row.analysis
    assert code is not None
    assert code.loop is not None
    mix = {title: code.loop.counts[name] for title, name in _MIX.items()}
    return {
        **_named(row, tile=True),
        "in flight": code.usage.copies_in_flight,
        **mix,
        "other": code.loop.total - sum(mix.values()),
        "slots/score": f"{code.slots_per_score:.2f}{'*' if code.serialised else ''}",
        "target": f"{row.target} {'met' if not row.failures else 'MISSED'}" if row.target else None,
    }


def _launch_cells(row: Row) -> dict[str, object]:
    assert row.cost is not None
    return {
        "problem": row.problem.name,
        "kernel": row.kernel,
        "slots/useful": f"{row.cost.slots_per_useful_score:.2f}",
        "MB moved": f"{row.cost.bytes_moved / 1e6:.2f}",
        **{f"{unit} us": f"{1e6 * seconds:.2f}" for unit, seconds in row.cost.bounds.items()},
        "binds": row.cost.binding,
    }


def _other_cells(row: Row) -> dict[str, object]:
    assert row.analysis is not None
    return {
        **_named(row),
        "code": sum(mix.total for mix in (row.analysis.taps, row.analysis.rest) if mix is not None),
        "programs": row.programs,
        "MB": f"{row.bytes_of_arguments / 1e6:.3f}",
        "memory us": f"{1e6 * row.bound[0]:.3f}",
    }


def parser_of(command: str, description: str, problems: list[str]) -> argparse.ArgumentParser:
    """The options of this report and of `kernel-times`."""
    what = description.split("\n\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(f"bra-bench {command}", description=what)
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="float16")
    add("--problem", nargs="+", choices=problems, default=problems)
    add("--form", choices=(ROUTED, SMALL_MAP), help="of the attention; by default each problem's own")
    add("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    add("--markdown", action="store_true", help="tables in Markdown")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = parser_of("report", __doc__, list(REPORTED))
    parser.add_argument("--arch", nargs="+", choices=HARDWARE, default=list(CHECKED_ARCHITECTURES))
    options = parser.parse_args(arguments)
    problems = [REPORTED[name] for name in options.problem]
    rows = collect(problems, options.arch, options.dtype, options.workers, options.form)
    if options.json:
        options.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    print(render(rows, options.markdown))
    failures = [failure for row in rows for failure in row.failures]
    print(*failures or ["All targets are met, and nothing spills where that is checked."], sep="\n")
    return 1 if failures else 0
