"""Runs all checks and measurements that need a GPU, in limited time: `bra-bench check`, or `make gpu-check`.

It needs PyTorch, Triton, einops, pytest and this working tree; it installs and downloads nothing. If the tree
is a copy without git, set the environment variable `BRA_TRITON_COMMIT` to its commit; the report repeats it.

The checks run first, several at a time:
- every mode, one process per mode (`tests/gpu`): float32, float16 and bfloat16 against the float64 reference,
  equal bits in every run, CUDA graphs, and that nothing waits for the GPU;
- every peer that will be timed, against the definition; this also compiles the peer.
Then the measurements run one after the other, in the order of `--parts`.

A command that fails, hangs or dies is reported, and the others go on. The folder of results holds
`report.md`, `results.json` and the log of every process; the first two are rewritten whenever a command ends.
The exit status is 1 if a command failed or a check did not finish; a measurement need not finish.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from bra_triton.bench import jobs, measure
from bra_triton.bench.console import count, parser_of, table, write_json
from bra_triton.bench.jobs import Job
from bra_triton.bench.measure import ROOT
from bra_triton.bench.problems import MODELS


class Part(NamedTuple):
    """One choice of `--parts`: commands that run one after the other."""

    limit: float  # seconds for all commands together
    commands: Sequence[str] = ()
    first: Mapping[str, str] = MappingProxyType({})  # by name, commands that run as checks: they compile
    needs: str = ""  # a package without which the part is left out


def _peers(limit: float, *rows: tuple[str, str]) -> Part:
    """A part that runs `bra-bench peers` once per row (problems, flags), with a check for each problem."""
    text = "bra-bench peers --problem {} {}"
    checks = {p: text.format(p, f"{flags} --check-only") for names, flags in rows for p in names.split()}
    return Part(limit, [text.format(*row) for row in rows], checks)


MAPS = (
    "yolo_p3 yolo_p4 yolo_p5 biformer_stage1 biformer_stage2 biformer_stage3 biformer_stage4 "
    "yolo_p3_n_win_5 yolo_p4_n_win_5"
)
SMALL_MAPS = "yolo_p5 yolo_p5_n_win_5 biformer_stage2 biformer_stage3 biformer_stage4 yolo_p4"
PEERS = "--peers fused reference gather dense torch"
FLEX = "--peers fused flex dense"
HOST_COMPILED = "bra-bench host --compiled --form identity --phase 'no grad' step"
# The most useful parts come first, because the time may not be enough for all.
PARTS = {
    "modes": Part(0),  # consists of checks only
    "small-maps": _peers(60, (SMALL_MAPS, "--batch 1 8 64 --peers fused dense")),
    "peers": _peers(120, (MAPS, f"--batch 8 {PEERS}"), ("high_resolution", f"--batch 4 {PEERS}")),
    "kernels": Part(100, [f"bra-bench kernel-times --problem {' '.join(MODELS)}"]),
    "host": Part(90, ["bra-bench host", HOST_COMPILED], {"compiled": f"{HOST_COMPILED} --repeats 1"}),
    # Without the other peers, which would hold 60 GB of scores and more.
    "largest-map": _peers(60, ("issue_21", "--peers fused torch --repeats 3")),
    "tiles": Part(150, ["bra-autotune --refine"]),
    # Not in "peers": every process traces FlexAttention anew, which takes longer than timing all other peers.
    "flex": _peers(150, (MAPS, f"--batch 8 {FLEX}"), ("high_resolution", f"--batch 4 {FLEX}")),
    "models": Part(150, ["bra-bench models --amp --batch 8"], needs="ultralytics"),
}
# The parts of a rehearsal without a GPU (`--device cpu`), on maps of a few tokens.
REHEARSED = {
    "modes": Part(0),  # consists of checks only
    "small-maps": _peers(60, ("tiny tiny_padded", "--batch 1 2 --peers fused dense --repeats 1")),
    "peers": _peers(60, ("tiny_padded", "--peers fused reference gather dense --repeats 1")),
    "host": Part(60, ["bra-bench host --form identity --phase 'no grad' --repeats 1"]),
}
TABLES = {"cuda": PARTS, "cpu": REHEARSED}
CHECKS = "checks"  # the part whose commands run several at a time and must all finish
# Limits of all checks, in seconds and as a share of the budget: one that hangs must leave time to measure.
CHECKS_LIMIT, CHECKS_SHARE = 240.0, 0.7
# The checks start in the order of the first words of their names. Modes start first: every measurement checks
# what it times, but only these checks test the modes, and on an H100, with little time left, three modes were
# not reached. Then come the longest, such as those with PyTorch's compiler, so that all end together.
ORDER_OF_CHECKS = ("mode", "file", "flex", "host", "largest-map", "peers")
IN_TREE = (sys.executable, str(ROOT / "bench" / "in_tree.py"))
PROGRAMS = {
    "bra-bench": (*IN_TREE, "bra_triton.bench.command_line"),
    "bra-autotune": (*IN_TREE, "bra_triton.bench.autotune"),
    "pytest": (*IN_TREE, "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"),
}
GPU_TESTS = ROOT / "tests" / "gpu"
NO_TESTS = 5  # pytest's exit status if all tests of a file were deselected
MOST_OUTPUT = 100_000  # characters at the end of a command's output that the report repeats


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 1 if a command failed or a check did not finish."""
    start = time.monotonic()
    options = _parse(arguments)
    versions = measure.circumstances(torch.device(options.device))
    folder = _slug(f"{versions['card'] or 'cpu'}-{versions['date']}")
    out = (options.out or ROOT / "runs" / "bench" / "results" / folder).resolve()
    plan = plan_of(options, out)
    checks_limit = min(CHECKS_LIMIT, CHECKS_SHARE * options.budget_seconds)

    def save() -> None:
        found = {job.name: _record(part, job) for part, planned in plan.items() for job in planned}
        results = {"versions": versions, "notes": options.notes, "jobs": found}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results)
        (out / "report.md").write_text(markdown(results))

    print(measure.on_one_line(versions), flush=True)
    # If `timeout` or a user stops this process, exit by an exception: `run_all` then kills what it started.
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        for part, planned in plan.items():
            save()
            limit = checks_limit if part == CHECKS else TABLES[options.device][part].limit
            deadline = min(start + options.budget_seconds, time.monotonic() + limit)
            workers = options.workers if part == CHECKS else 1
            for job in jobs.run_all(planned, workers, deadline, ROOT, _environment(part, options, out)):
                save()
                print(f"[{time.monotonic() - start:4.0f} s] {job.name}: {job.status}", flush=True)
    finally:
        signal.signal(signal.SIGTERM, handler)
    save()
    bad = any(job.status == jobs.FAILED for planned in plan.values() for job in planned)
    bad |= any(job.status != jobs.PASSED for job in plan[CHECKS])
    print((out / "report.md").read_text())
    print(f"{'FAILED' if bad else 'passed'}: {out / 'report.md'}, {time.monotonic() - start:.0f} s")
    return int(bad)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("check", __doc__, has_json=False)
    add = parser.add_argument
    add("--out", type=Path, help="folder (default: runs/bench/results/CARD-DATE)")
    add("--budget-seconds", type=float, default=840.0, help="time limit of the whole run (default: 840)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny maps, interpreted")
    add("--parts", nargs="+", choices=PARTS, help="parts to run, in the order given (default: all)")
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))  # each has a GPU context of half a GiB
    add("--workers", type=count, default=workers, help="checks that run at the same time")
    options = parser.parse_args(arguments)
    if not (ROOT / "pyproject.toml").is_file():
        parser.error(f"check needs a clone of the repository with its tests; {ROOT} is not one")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu rehearses without one")
    chosen, options.parts, options.notes = options.parts or PARTS, [], []
    for name in chosen:
        package = PARTS[name].needs
        if name not in TABLES[options.device]:
            options.notes.append(f"{name} was left out: it needs a GPU")
        elif package and importlib.util.find_spec(package) is None:
            options.notes.append(f"{name} was left out: no {package} here")
        else:
            options.parts.append(name)
    if not options.parts:
        parser.error(f"no part is left to run: {'; '.join(options.notes)}")
    return options


def plan_of(options: argparse.Namespace, out: Path) -> dict[str, list[Job]]:
    """The jobs by part, in the order in which they run: the checks, then the parts of `options`."""
    parts = {name: TABLES[options.device][name] for name in options.parts}
    plan: dict[str, list[Job]] = {CHECKS: []}
    for name, part in parts.items():
        plan[CHECKS] += [_job(out, f"{name} {what}", text) for what, text in part.first.items()]
        plan[name] = [_job(out, f"{name} {i}", text) for i, text in enumerate(part.commands, 1)]
    if "modes" in parts:
        # Under the interpreter some modes have no tests, and all tests of a file may be marked `compiled`.
        passes = (0, NO_TESTS) if options.device == "cpu" else (0,)
        modes = GPU_TESTS / "test_modes.py"
        for file in sorted({*GPU_TESTS.glob("test_*.py")} - {modes}):
            name = f"file {file.parent.name}/{file.stem}"
            # Without the tests marked `compiled`: they need no GPU, and `make test` runs them.
            plan[CHECKS].append(_job(out, name, f"pytest -m 'not compiled' {file}", passes))
        for mode in all_modes():
            plan[CHECKS].append(_job(out, f"mode {mode}", f"pytest -k '[{mode}-' {modes}", passes))
    plan[CHECKS].sort(key=lambda job: [not job.name.startswith(name) for name in ORDER_OF_CHECKS])
    return plan


def all_modes() -> list[str]:
    """Names of the modes in `tests/gpu/modes.py`; the ids of the tests begin with them."""
    sys.path += [str(ROOT / "tests"), str(GPU_TESTS)]
    return [mode.name for mode in importlib.import_module("modes").MODES]


def _job(out: Path, name: str, text: str, passes: Sequence[int] = (0,)) -> Job:
    """The job of a command as a user types it; `bra-bench` writes its numbers beside the log."""
    log = out / "logs" / f"{_slug(name)}.log"
    program, *words = shlex.split(text)
    numbers = ["--json", str(log.with_suffix(".json"))] if program == "bra-bench" else []
    return Job(name, text.replace(f"{ROOT}/", ""), [*PROGRAMS[program], *words, *numbers], log, passes)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _environment(part: str, options: argparse.Namespace, out: Path) -> dict[str, str]:
    environment = {
        "YOLO_OFFLINE": "true",
        "PYTHONUNBUFFERED": "1",  # the log has all that a killed process had printed
        # Without the plugins of pytest that happen to be installed; the tests need none.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "COLUMNS": "500",  # pytest cuts the lines of its summary to this width
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # by default every process starts one for each core
        # A separate folder: launches get the shipped tiles, not those that `bra-autotune` kept for this user.
        "BRA_TRITON_CACHE": str(out / "tiles" / part),
    }
    if part == CHECKS:
        environment["OMP_NUM_THREADS"] = "1"
    if options.device == "cpu":
        # The checks interpret kernels; `bra-bench host` launches compiled ones with a stand-in driver.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if part == CHECKS else "0"}
    return environment


def _record(part: str, job: Job) -> dict[str, Any]:
    """The entry of a job in `results.json`; for a measurement also its output and its numbers."""
    shown = ("name", "status", "seconds", "says", "failures")
    found = {"part": part, "command": job.text, **{name: getattr(job, name) for name in shown}}
    if part != CHECKS:
        found["output"] = job.printed[-MOST_OUTPUT:]
        # A command that was killed has left no file of numbers, or an incomplete one.
        with contextlib.suppress(OSError, ValueError):
            found["numbers"] = json.loads(job.log.with_suffix(".json").read_text())
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The report: card and versions, all commands, why some failed, and what the measurements printed."""
    found = list(results["jobs"].values())
    passed = sum(job["status"] == jobs.PASSED for job in found)
    versions = [f"- {key} {value}" for key, value in results["versions"].items() if value]
    lines = ["# GPU check", "", *versions, "", f"{passed} of {len(found)} commands passed.", ""]
    lines += [f"- {note}" for note in results["notes"]]
    columns = ("part", "name", "status", "seconds", "says")
    cells = [{name: str(job[name]).replace("|", "/") for name in columns} for job in found]
    lines += ["", table("Commands", cells), ""]
    whys = [f"- {job['name']}: `{why}`" for job in found for why in job["failures"]]
    if whys:
        lines += ["## Failures", "", *whys, ""]
    for job in found:
        if output := job.get("output", "").strip():
            shown = output if "|--" in output else f"```\n{output}\n```"  # tables are Markdown already
            title = f"# {job['part']}: {job['status']}, {job['seconds']:.0f} s"
            lines += [title, "", f"`{job['command']}`", "", shown, ""]
    return "\n".join(lines).rstrip() + "\n"
