"""The kernel report: the cost of every kernel with the tiles that the package ships. Needs no GPU.

All figures are counted in compiled code, or predicted from these counts (`machine_code/cost_model.py`);
nothing is measured. The exit status is 1 if a target is missed, or if a shipped configuration spills in
float16 on sm_80 or sm_90. The report stops with an error at a kernel that does not compile.
"""

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from bra_triton.bench.console import count, parser_of, table
from bra_triton.bench.machine_code import launches
from bra_triton.bench.machine_code.cost_model import Cost, predict
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.static_analysis import Analysis, analyse, in_processes
from bra_triton.bench.measure import DTYPES
from bra_triton.bench.problems import MODELS, MODES, PROBLEMS, Problem
from bra_triton.kernels import tiles
from bra_triton.kernels.forms import ROUTED, SMALL_MAP, use_form
from bra_triton.kernels.plan import Launch

# The most issue slots per score that the shipped loops may take, by kernel and architecture, then by channels
# of a head; for float16 and regions of at least TARGET_REGION_TOKENS. A target is what the loop of plain
# dense attention took in the same tile (Triton 3.8, at commit fcc7952, which had such kernels), times 1.08 in
# the forward and 1.12 in the gradients: this margin is for routing. The shipped loops took 0.93 to 1.09 times
# the slots of the dense ones. Two targets of sm_90 are higher, because the tile that was the fastest on an
# H100 takes more slots: it computes an eighth of the exponentials by multiply-adds (forward, heads of 64) or
# has five stages (dK/dV, heads of 32).
TARGETS = {
    ("attention_forward", "sm_80"): {32: 9.18, 64: 12.29},
    ("attention_forward", "sm_90"): {32: 8.51, 64: 9.75},
    ("query_gradient", "sm_80"): {32: 8.72, 64: 11.38},
    ("query_gradient", "sm_90"): {32: 7.56, 64: 8.05},
    ("key_value_gradient", "sm_80"): {32: 12.32, 64: 15.05},
    ("key_value_gradient", "sm_90"): {32: 8.95, 64: 10.29},
}
TARGET_REGION_TOKENS = 100
CHECKED_ARCHITECTURES = ("sm_80", "sm_90")

# The most time that the attention kernels of a pass may take, as a multiple of the time of dense attention to
# the same map; both are predicted. Masked attention (biformer_stage3) may take more: it also loads marks.
MOST_BESIDE_DENSE = {"yolo_p4": 1.0, "yolo_p5_n_win_5": 1.0, "biformer_stage3": 1.1}
_BATCH_BESIDE_DENSE = 8
REPORTED = MODELS | MODES | {name: PROBLEMS[name] for name in MOST_BESIDE_DENSE}

_NOTES = """\
Compiled and counted, or predicted from the counts; nothing is measured. Issue slots: warp instructions x 32.
slots/score: of the loop over whole tiles; a star: ptxas has serialised its matrix instructions (each waits).
in flight: asynchronous copies for later steps that still run while a step computes; 0: every step waits for
all copies.
slots/useful: issue slots of the whole kernel (with padding of tiles, list tail, prologue and epilogue) per
score that the result depends on; every loop counts as often as the problem runs it.
Bounds are in microseconds per launch at peak rates, each as if nothing else took time.
MB: size of a launch's arrays, each counted once; for attention kernels without scratch. A launch that reads
only a part of a packed map moves less. memory us: the time to move those bytes.
code: number of instructions of a kernel, for kernels other than the attention."""


class BesideDense(NamedTuple):
    """Predicted seconds of a pass's attention kernels and of dense attention's, both without LePE."""

    problem: Problem
    arch: str
    direction: str  # "forward" or "backward"
    seconds: float
    dense_seconds: float

    @property
    def ratio(self) -> float:
        """The kernels' time as a multiple of dense attention's."""
        return self.seconds / self.dense_seconds

    @property
    def target(self) -> float | None:
        """The most that `ratio` may be; None if there is no target."""
        return MOST_BESIDE_DENSE.get(self.problem.name)

    @property
    def failures(self) -> list[str]:
        """The missed target in words, which makes the report fail; empty if the target is met."""
        if self.target is None or self.ratio <= self.target:
            return []
        where = f"{self.problem.name}, {self.arch}, {self.direction}"
        return [f"{where}: {self.ratio:.2f} times as long as dense attention, target {self.target}"]


class Row(NamedTuple):
    """One kernel of one problem on one architecture."""

    problem: Problem
    dtype: str
    arch: str
    kernel: str
    programs: int  # thread blocks of the launch
    bytes_of_arguments: int
    analysis: Analysis
    cost: Cost | None = None  # prediction, for attention kernels

    @property
    def bounds(self) -> dict[str, float]:
        """Lower bounds of the launch's time in seconds, by unit."""
        memory = self.bytes_of_arguments / HARDWARE[self.arch].bandwidth
        return {**(self.cost.bounds if self.cost else {}), "memory": memory}

    @property
    def binding(self) -> str:
        """The unit with the largest bound."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def target(self) -> float | None:
        """The most issue slots per score that the kernel's loop may take; None if there is no target."""
        large = self.problem.grid.region_tokens >= TARGET_REGION_TOKENS and self.dtype == "float16"
        by_head = TARGETS.get((self.kernel, self.arch), {}) if self.problem.is_plain and large else {}
        return by_head.get(self.problem.head_dims[1])

    @property
    def failures(self) -> list[str]:
        """What makes the report fail, in words: spills and a missed target; empty if there is neither."""
        found, spills = [], self.analysis.usage.spills
        if spills and self.dtype == "float16" and self.arch in CHECKED_ARCHITECTURES:
            found.append(f"{spills} instructions spill")
        if self.target is not None and (slots := self.analysis.slots_per_score) > self.target:
            found.append(f"{slots:.2f} issue slots per score, target {self.target}")
        return [f"{self.problem.name}, {self.arch}, {self.kernel}: {each}" for each in found]


def shipped(problem: Problem, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Launches of a problem's forward and backward with the tiles shipped for `arch`, each kernel once."""
    with tiles.use_architecture(arch):
        recorded = launches.record_attention(problem, dtype)
    return list({launches.variant(launch): launch for launch in recorded}.values())


def collect(
    problems: Sequence[Problem], architectures: Sequence[str], dtype: str = "float16", workers: int = 1
) -> list[Row]:
    """Compiles and analyses the kernels that the problems launch; RuntimeError if one does not compile."""
    launched = [
        (problem, arch, launch)
        for arch in architectures
        for problem in problems
        for launch in shipped(problem, DTYPES[dtype], arch)
    ]
    # Problems share kernels: each is compiled once.
    jobs = {(launches.variant(launch), arch): (launch, arch) for _, arch, launch in launched}
    results = in_processes(analyse, jobs, workers)
    rows = []
    for problem, arch, launch in launched:
        result, kernel, cost = results[launches.variant(launch), arch], launches.kernel_name(launch), None
        if isinstance(result, Exception):
            raise RuntimeError(f"{problem.name}, {arch}, {kernel} does not compile: {result}")
        if result.loop:
            # A kernel that gets marks is masked: every query meets all keys.
            masked = launches.arguments_of(launch).get("marks") is not None
            cost = predict(kernel, result, problem, HARDWARE[arch], DTYPES[dtype].itemsize, masked)
        n_bytes = launches.bytes_of_arguments(launch, scratch=cost is None)
        rows.append(Row(problem, dtype, arch, kernel, math.prod(launch.grid), n_bytes, result, cost))
    return rows


def compare_with_dense(
    problems: Sequence[Problem], architectures: Sequence[str], dtype: str = "float16", workers: int = 1
) -> list[BesideDense]:
    """Predicts the time of the plain problems' attention kernels, and of dense attention's.

    Dense attention is computed by the same kernels, with the whole map as the only region.
    """
    plain = [problem for problem in problems if problem.is_plain]
    alone = [replace(p, batch=_BATCH_BESIDE_DENSE, side_dwconv=0) for p in plain]
    dense = [replace(p, n_win=1, topk=1) for p in alone]
    seconds: defaultdict[tuple[Problem, str, str], float] = defaultdict(float)
    for row in collect(list(dict.fromkeys([*alone, *dense])), architectures, dtype, workers):
        if row.cost:
            direction = "forward" if "forward" in row.kernel else "backward"
            seconds[row.problem, row.arch, direction] += row.bounds[row.binding]
    return [
        BesideDense(problem, arch, direction, *(seconds[each, arch, direction] for each in (routed, whole)))
        for arch in architectures
        for problem, routed, whole in zip(plain, alone, dense, strict=True)
        for direction in ("forward", "backward")
    ]


def render(rows: Sequence[Row], beside_dense: Sequence[BesideDense]) -> str:
    """The whole report as text, for all architectures of the rows."""
    parts = [_NOTES]
    beside = f"attention kernels beside dense attention, batch {_BATCH_BESIDE_DENSE}, without LePE, predicted"
    for arch in dict.fromkeys(row.arch for row in rows):
        here = [row for row in rows if row.arch == arch]
        attention = [row for row in here if row.cost is not None]
        tables = {
            "attention kernels, loops": [_occupies(row) | _loop_cells(row) for row in attention],
            "attention kernels, launches": [_launch_cells(row) for row in attention],
            "other kernels": [_occupies(row) | _other_cells(row) for row in here if not row.cost],
            beside: [_dense_cells(each) for each in beside_dense if each.arch == arch],
        }
        parts += [table(f"{arch} ({HARDWARE[arch].gpu}): {title}", cells) for title, cells in tables.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _occupies(row: Row) -> dict[str, object]:
    """The cells that say what a kernel's thread blocks occupy of a multiprocessor."""
    code, usage = row.analysis, row.analysis.usage
    tile = {"M x N, warps": f"{code.block_m}x{code.block_n}, {code.num_warps}"} if row.cost else {}
    return {
        "problem": row.problem.name,
        "kernel": row.kernel,
        **tile,
        "registers": usage.registers,
        "shared": f"{usage.shared_bytes / 1024:.1f} K",
        "spills": usage.spills,
        "warps/SM": HARDWARE[row.arch].resident_warps(usage.registers, usage.shared_bytes, code.num_warps),
    }


def _loop_cells(row: Row) -> dict[str, object]:
    code = row.analysis
    return {
        "in flight": code.usage.copies_in_flight,
        **code.loop,
        "slots/score": f"{code.slots_per_score:.2f}{'*' if code.serialised else ''}",
        "target": f"{row.target} {'met' if not row.failures else 'MISSED'}" if row.target else None,
    }


def _launch_cells(row: Row) -> dict[str, object]:
    assert row.cost is not None
    return {
        "problem": row.problem.name,
        "kernel": row.kernel,
        "slots/useful": f"{row.cost.slots_per_useful_score:.2f}",
        "MB moved": f"{row.bytes_of_arguments / 1e6:.2f}",
        **{f"{unit} us": f"{1e6 * seconds:.2f}" for unit, seconds in row.bounds.items()},
        "binds": row.binding,
    }


def _other_cells(row: Row) -> dict[str, object]:
    return {
        "code": row.analysis.taps.total() + row.analysis.rest.total(),
        "programs": row.programs,
        "MB": f"{row.bytes_of_arguments / 1e6:.3f}",
        "memory us": f"{1e6 * row.bounds['memory']:.3f}",
    }


def _dense_cells(row: BesideDense) -> dict[str, object]:
    return {
        "problem": row.problem.name,
        "pass": row.direction,
        "us": f"{1e6 * row.seconds:.2f}",
        "dense us": f"{1e6 * row.dense_seconds:.2f}",
        "ratio": f"{row.ratio:.2f}",
        "target": f"{row.target} {'met' if not row.failures else 'MISSED'}" if row.target else None,
    }


def kernel_options(
    command: str, module_doc: str, problems: list[str], has_json: bool = False
) -> argparse.ArgumentParser:
    """The options of this report and of `kernel-times`."""
    parser = parser_of(command, module_doc, has_json=has_json)
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="float16")
    add("--problem", nargs="+", choices=problems, default=problems)
    add("--form", choices=(ROUTED, SMALL_MAP), help="form of the attention (default: each problem's own)")
    add("--workers", type=count, default=os.cpu_count() or 1, help="processes that compile")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = kernel_options("report", __doc__, list(REPORTED))
    parser.add_argument("--arch", nargs="+", choices=HARDWARE, default=list(CHECKED_ARCHITECTURES))
    options = parser.parse_args(arguments)
    problems = [REPORTED[name] for name in options.problem]
    with use_form(options.form):
        asked = (problems, options.arch, options.dtype, options.workers)
        rows, beside_dense = collect(*asked), compare_with_dense(*asked)
    print(render(rows, beside_dense))
    failures = [failure for row in rows for failure in row.failures]
    failures += [failure for row in beside_dense for failure in row.failures]
    print(*failures or ["All targets are met, and nothing spills where that is checked."], sep="\n")
    return int(bool(failures))
