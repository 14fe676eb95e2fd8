"""All that needs a GPU, in one command and in limited time: `bra-bench check`, or `make gpu-check`.

Needs PyTorch, Triton, einops and pytest, and this working tree; nothing is installed or downloaded. Where the
tree is a copy without git, `BRA_TRITON_COMMIT` says of which commit, and the report repeats it.

1. Every mode in float32, float16 and bfloat16 against the float64 reference, for the same bits in every run,
   in CUDA graphs (forward and training step), and for host synchronisation (`tests/gpu`), a process a mode.
   Beside them the rest of the tests, as far as what they import is there, and every peer of the benchmark
   against the definition.
2. Times and memory beside the peers (`bra-bench peers`), one row after the other, as long as the time lasts.

Whatever fails is reported and the rest goes on. The folder of results holds `results.json`, `report.md` and
the log of every process, and is complete at any moment. Exit status 1 if a check failed or did not finish.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bra_triton.bench import jobs, measure
from bra_triton.bench.jobs import Job
from bra_triton.bench.measure import ROOT
from bra_triton.bench.peer_times import file_name, report
from bra_triton.bench.tables import table

# Problem, batch and dtype; the most telling first, since the time may not last for all.
ROWS = (
    *(
        f"{name}:8:float16"
        for name in ("yolo_p3", "biformer_stage1", "yolo_p4", "biformer_stage2", "yolo_p5")
    ),
    *("biformer_stage3:8:float16", "biformer_stage4:8:float16", "yolo_p3:1:float16"),
)
ROWS_ON_CPU = ("tiny:1:float32", "tiny_padded:2:float32")
IN_TREE = (sys.executable, str(ROOT / "bench" / "in_tree.py"))
PYTEST = (*IN_TREE, "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
PARTS = ("modes", "suite", "peers", "benchmark")
NO_TESTS = 5  # how pytest ends where all tests of a file were deselected
# The share of the time that checks may take; the benchmark's need is small once its kernels are compiled.
CHECK_SHARE = 0.6
# Files of tests that start before the modes: on an H200 the last three took 85 to 201 s, a mode or a peer
# some 40 s. The first waits for PyTorch's compiler, and was not timed on a GPU.
LONGEST_FILES = ("test_torch_compile", "test_attention", "test_routed_attention", "test_operators")
WHAT_THE_COLUMNS_SAY = """\
Medians, in ms. `work`: how long the GPU works, with a cold cache and launches hidden; `x`: that time
over the fused row's; `call`: what a caller waits who waits for every call; `peak`: memory beyond the
inputs. `dense` does not route."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and the benchmark; returns 1 if a check failed or did not finish."""
    start = time.monotonic()
    options = _parse(arguments)
    described = measure.circumstances(torch.device(options.device))
    name = _slug(f"{described['card'] or 'cpu'}-{described['date']}")
    out = options.out or ROOT / "runs" / "bench" / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    check_deadline = start + CHECK_SHARE * options.budget_seconds
    deadline = start + options.budget_seconds
    results: dict[str, Any] = {"versions": described, "checks": [], "rows": [], "notes": []}
    print(measure.on_one_line(described), flush=True)

    planned = _plan(options, out, results["notes"])
    environment = _environment(options.device, threads=1 if len(planned) > 1 else None)
    for outcome in jobs.run_all(planned, options.workers, check_deadline, ROOT, environment):
        results["checks"].append(vars(outcome))
        _say(start, f"{outcome.status:12} {outcome.name} ({outcome.seconds:.0f} s)")
        _write(results, out)
    if "benchmark" in options.parts:
        _benchmark(options, out, results, start, deadline)
    bad = [check for check in results["checks"] if check["status"] != jobs.PASSED]
    _write(results, out)
    print((out / "report.md").read_text())
    print(f"{'FAILED' if bad else 'passed'}: {out / 'report.md'}, {time.monotonic() - start:.0f} s")
    return 1 if bad else 0


def _plan(options: argparse.Namespace, out: Path, notes: list[str]) -> list[Job]:
    """The checks, the longest first, so that all end at about the same time."""
    planned, files = [], {}
    if "peers" in options.parts:
        for row in options.rows:
            planned.append(_job(out, f"peers {row}", _row_command(row, options, "--check-only")))
    if "suite" in options.parts:
        paths = [*(ROOT / "tests/kernels").glob("test_*.py"), *(ROOT / "tests/bra_triton").glob("test_*.py")]
        for path in sorted(paths):
            if missing := missing_imports(path):
                notes.append(f"{path.relative_to(ROOT)} was not run: no {', '.join(missing)} here")
                continue
            # What is marked `compiled` compiles for GPUs that are not here: `make test` does that.
            command = [*PYTEST, "-m", "not compiled", str(path.relative_to(ROOT))]
            files[path.stem] = _job(out, f"file {path.stem}", command, passes=(0, NO_TESTS))
    planned = [files.pop(name) for name in LONGEST_FILES if name in files] + planned
    if "modes" in options.parts:
        # The interpreter, in a rehearsal, leaves some modes out.
        passes = (0, NO_TESTS) if options.device == "cpu" and not options.modes else (0,)
        for mode in options.modes or all_modes():
            command = [*PYTEST, "-k", f"[{mode}-", str(options.tests)]
            planned.append(_job(out, f"mode {mode}", command, passes))
    return planned + list(files.values())


def _job(out: Path, name: str, command: Sequence[str], passes: Sequence[int] = (0,)) -> Job:
    return Job(name, command, out / "logs" / f"{_slug(name)}.log", passes)


def all_modes() -> list[str]:
    """Names of the modes of `tests/gpu/modes.py`, by which its tests are named."""
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    return [mode.name for mode in importlib.import_module("modes").MODES]


def missing_imports(path: Path) -> list[str]:
    """The packages that a test file imports, at any depth, and that are not there."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    beside = {p.stem for folder in (path.parent, ROOT / "tests") for p in folder.glob("*.py")}
    return sorted(n for n in names - beside if importlib.util.find_spec(n) is None)


def _benchmark(
    options: argparse.Namespace, out: Path, results: dict[str, Any], start: float, deadline: float
) -> None:
    """Runs the rows one after the other, each in a process: what breaks one leaves the others alone."""
    commands = {row: _row_command(row, options, "--out", str(out / "rows")) for row in options.rows}
    planned = [_job(out, f"row {row}", command) for row, command in commands.items()]
    for outcome in jobs.run_all(planned, 1, deadline, ROOT, _environment(options.device)):
        _say(start, f"{outcome.status:12} {outcome.name} ({outcome.seconds:.0f} s)")
        if outcome.status == jobs.FAILED:
            results["checks"].append(vars(outcome))
        elif outcome.status == jobs.NOT_FINISHED:
            spent = f"the budget of {options.budget_seconds:.0f} s was spent"
            results["notes"].append(f"{outcome.name} was not finished: {spent}")
        path = out / "rows" / file_name(*outcome.name.removeprefix("row ").split(":"))
        if path.exists():
            results["rows"].append(json.loads(path.read_text()))
        _write(results, out)


def _row_command(row: str, options: argparse.Namespace, *flags: str) -> list[str]:
    problem, batch, dtype = row.split(":")
    numbers = ["--problem", problem, "--batch", batch, "--dtype", dtype, "--repeats", str(options.repeats)]
    flags = (*flags, "--no-compile") if options.no_compile else flags
    command = (*IN_TREE, "bra_triton.bench.command_line", "peers")
    return [*command, *numbers, "--device", options.device, *flags]


def _environment(device: str, threads: int | None = None) -> dict[str, str]:
    # Nobody knows what plugins of pytest lie on another machine; the tests need none.
    environment = {"YOLO_OFFLINE": "true", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["COLUMNS"] = "500"  # to which pytest cuts the lines of its summary
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return environment


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _say(start: float, text: str) -> None:
    print(f"[{time.monotonic() - start:4.0f} s] {text}", flush=True)


def _write(results: dict[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "report.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """What was run, on and with what, what failed and why, and the tables."""
    checks = sorted(results["checks"], key=lambda check: check["name"])
    passed = sum(check["status"] == jobs.PASSED for check in checks)
    versions = [f"- {key} {value}" for key, value in results["versions"].items() if value]
    lines = ["# GPU check", "", *versions, "", f"{passed} of {len(checks)} checks passed.", ""]
    lines += [f"- {note}" for note in results["notes"]]
    columns = ("name", "status", "says", "seconds")
    cells = [{name: str(check[name]).replace("|", "/") for name in columns} for check in checks]
    lines += ["", table("Checks", cells, markdown=True), ""]
    if failures := [(check["name"], why) for check in checks for why in check["failures"]]:
        lines += ["## Failures", "", *(f"- {name}: `{_on_one_line(why)}`" for name, why in failures), ""]
    if results["rows"]:
        lines += [WHAT_THE_COLUMNS_SAY, "", report(results["rows"])]
    return "\n".join(lines).rstrip() + "\n"


def _on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("`", "'")[-500:]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bra-bench check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder (default: runs/bench/results/CARD-DATE)")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="of the whole (default: 540)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, interpreted"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="only these of tests/gpu/modes.py")
    parser.add_argument("--rows", nargs="+", metavar="PROBLEM:BATCH:DTYPE", help="of the benchmark")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of a median")
    parser.add_argument("--no-compile", action="store_true", help="FlexAttention uncompiled")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "gpu", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (ROOT / "pyproject.toml").is_file():
        parser.error(
            f"it runs the tests of a working tree, and {ROOT} is none: run it in a clone of the repository"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --device cpu rehearses without one")
    options.rows = options.rows or list(ROWS if options.device == "cuda" else ROWS_ON_CPU)
    for row in options.rows:
        if row.count(":") != 2:
            parser.error(f"--rows takes PROBLEM:BATCH:DTYPE, got {row!r}")
    options.out = options.out and options.out.resolve()
    return options
