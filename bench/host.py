"""What a call costs the CPU, beside a plain attention module and the einops reference in the same process.

Without a GPU, kernels take Triton's real launch path and a stand-in for the driver (`stand_in`); with one,
they are launched on it, and a call is timed until it returns. Either way maps are so small that neither
kernels nor PyTorch's own operators take long: what is left is Python, dispatch and launches. The calls take
turns, and times are minima of many; the ratio to the plain module (Linear, `scaled_dot_product_attention`,
Linear) is what carries over to another machine.
"""

import argparse
import contextlib
import cProfile
import json
import math
import pstats
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bra_triton import BiLevelRoutingAttention, nchwBRA
from bra_triton.bench import measure, stand_in
from bra_triton.bench.problems import PROBLEMS
from bra_triton.bench.tables import table
from bra_triton.kernels.plan import Launch, Plan

_SMALL = PROBLEMS["host"]
NCHW = "nchwBRA"
FORMS = {
    "identity": _SMALL,
    "padded": replace(_SMALL, height=7, width=7),
    "soft": replace(_SMALL, routing_weight="soft"),
    NCHW: _SMALL,
}
PHASES = ("no grad", "grad", "step")
OURS, PLAIN, EINOPS = "fused", "plain", "einops"
Row = dict[str, Any]


class Target(NamedTuple):
    """The most that a call of the fused module may cost: a ratio to the plain module, or to another form."""

    form: str
    phase: str
    most: float
    over: str = PLAIN
    compiled: bool = False

    def __str__(self) -> str:
        compiled = "compiled " if self.compiled else ""
        return f"{compiled}{self.form}, {self.phase}: at most {self.most} times {compiled}{self.over}"


TARGETS = (
    Target("identity", "no grad", 1.0),
    Target("identity", "step", 1.15),
    *(Target(f, p, 1.3, "identity") for f in ("padded", "soft", NCHW) for p in ("no grad", "step")),
    Target("identity", "step", 1.0, compiled=True),
)


class PlainAttention(nn.Module):
    """Multi-head attention of every token to every token: what users compare a call with."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, H, W, dim)` to the same."""
        batch, height, width, dim = x.shape
        packed = self.qkv(x.flatten(1, 2)).view(batch, height * width, 3, self.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.wo(out.transpose(1, 2).reshape(batch, height, width, dim))


def modules_of(form: str, device: torch.device) -> dict[str, nn.Module]:
    """The fused module, the plain one and the einops reference of a form."""
    problem = FORMS[form]
    modules: dict[str, nn.Module] = {PLAIN: PlainAttention(problem.dim, problem.num_heads)}
    for name, backend in ((OURS, "triton"), (EINOPS, "reference")):
        if form == NCHW:
            sizes = (problem.dim, problem.num_heads, problem.n_win)
            modules[name] = nchwBRA(*sizes, topk=problem.topk, backend=backend)
        else:
            modules[name] = BiLevelRoutingAttention(**problem.module_arguments, backend=backend)
    return {name: module.to(device) for name, module in modules.items()}


def measure_phase(phase: str, options: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row per form: seconds by module; of the fused module launches and PyTorch's operators, too.

    All modules of all forms take turns, so that their times compare.
    """
    rows: dict[str, Row] = {}
    runs: dict[tuple[str, str], measure.Run] = {}
    for form in options.form:
        rows[form] = {"form": form, "phase": phase, "compiled": options.compiled}
        try:
            calls = calls_of(form, phase, options.compiled, device)
            rows[form]["launches"] = launches_of(calls[OURS])
            rows[form]["operators"] = measure.operator_calls(calls[OURS])
            runs |= {(form, name): call for name, call in calls.items()}
        except Exception as error:  # of PyTorch's or Triton's compiler, of any kind
            rows[form]["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for (form, name), seconds in measure.interleaved_minima(runs, device, options.repeats).items():
        rows[form].setdefault("seconds", {})[name] = seconds
        if options.profile and name == OURS:
            print(
                f"{form}, {phase}: where the time of {options.repeats} calls goes, profiling itself included"
            )
            with cProfile.Profile() as profiler:
                for _ in range(options.repeats):
                    runs[form, name]()
            pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(options.profile)
    return list(rows.values())


def calls_of(form: str, phase: str, compiled: bool, device: torch.device) -> dict[str, measure.Run]:
    """A call of each module of a form; compiled without the einops reference."""
    problem = FORMS[form]
    x = torch.randn(problem.batch, problem.height, problem.width, problem.dim, device=device)
    calls = {}
    for name, module in modules_of(form, device).items():
        if compiled and name == EINOPS:
            continue
        if compiled:
            module.compile()
        is_nchw = form == NCHW and name != PLAIN
        calls[name] = measure.call_of(module, x.permute(0, 3, 1, 2).contiguous() if is_nchw else x, phase)
        calls[name]()
    return calls


def launches_of(run: measure.Run) -> int:
    """Kernels of this package that a call launches."""
    launched: list[Launch] = []
    launch = Plan._launch

    def note(plan: Plan, tensors: list[Tensor | None]) -> None:
        launched.extend(plan.launches)
        launch(plan, tensors)

    with mock.patch.object(Plan, "_launch", note):
        run()
    return len(launched)


def missed(rows: Sequence[Row]) -> list[str]:
    """The targets that were measured and missed, in words; a failure to measure misses."""
    seconds = {(row["form"], row["phase"], row["compiled"]): row.get("seconds") for row in rows}
    failures = []
    for target in TARGETS:
        other_form, name = (target.form, PLAIN) if target.over == PLAIN else (target.over, OURS)
        ours, other = ((form, target.phase, target.compiled) for form in (target.form, other_form))
        if ours in seconds and other in seconds:
            of_ours, of_other = seconds[ours], seconds[other]
            ratio = of_ours[OURS] / of_other[name] if of_ours and of_other else math.nan
            failures += [] if ratio <= target.most else [f"{target}, got {ratio:.2f}"]
    return failures


def report(rows: Sequence[Row]) -> str:
    """The rows as text: times in us, and their ratios to the plain module's."""
    cells = [
        {
            **{key: row[key] for key in ("form", "phase")},
            **{f"{name} us": f"{1e6 * each:.0f}" for name, each in row["seconds"].items()},
            **{
                f"{name}/{PLAIN}": f"{each / row['seconds'][PLAIN]:.2f}"
                for name, each in row["seconds"].items()
            },
            **{key: row[key] for key in ("launches", "operators")},
        }
        for row in rows
        if "seconds" in row
    ]
    errors = [f"{row['form']}, {row['phase']}: {row['error']}" for row in rows if "error" in row]
    title = "CPU time of a call, torch.compile" if rows[0]["compiled"] else "CPU time of a call"
    return "\n".join([table(title, cells), *errors])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; with `--check` returns 1 where a target is missed."""
    options = _parse(arguments)
    device = measure.default_device()
    torch.set_num_threads(1)
    described = measure.circumstances(device)
    launcher = "its own driver" if device.type == "cuda" else "a stand-in for the driver"
    print(f"{measure.on_one_line(described)}\nlaunches by {launcher}; minima of {options.repeats} calls\n")
    context = contextlib.nullcontext() if device.type == "cuda" else stand_in.without_gpu()
    rows = []
    with context, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Inductor, about the machine
        for phase in options.phase:
            rows += measure_phase(phase, options, device)
    print(report(rows))
    if options.json:
        options.json.write_text(json.dumps({"versions": described, "rows": rows}, indent=1) + "\n")
    if not options.check:
        return 0
    failures = missed(rows)
    print(*(f"MISSED: {failure}" for failure in failures), sep="\n")
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bra-bench host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--repeats", type=int, default=300, help="calls, of which the fastest counts")
    parser.add_argument("--compiled", action="store_true", help="both modules under torch.compile")
    parser.add_argument("--profile", type=int, metavar="N", default=0, help="also the N costliest functions")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options
