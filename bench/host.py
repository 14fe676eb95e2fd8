"""Measures the CPU time of a call, beside a plain attention module and the einops reference.

Without a GPU, kernels take Triton's real launch path to a stand-in for the driver (`stand_in`). With a GPU,
they are launched on it, and a call is timed until it returns, not until the GPU is idle. The maps are so
small that kernels and PyTorch's own operators take little time: most of the time is Python, dispatch and
launches. All calls are made in one process and take turns, and each time is the minimum of many. Only the
ratio to the plain module (Linear, `scaled_dot_product_attention`, Linear) can be compared between machines.
"""

import argparse
import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bra_triton import BiLevelRoutingAttention, nchwBRA
from bra_triton.bench import measure, stand_in
from bra_triton.bench.console import conclude, parser_of, table, write_json
from bra_triton.bench.problems import PROBLEMS
from bra_triton.kernels.plan import Plan

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
# The most CPU time that a call of our module may take, by form, phase and whether it is compiled: for the
# identity form as a multiple of the plain module's time, for the other forms of our identity form's time.
TARGETS = {
    ("identity", "no grad", False): 1.0,
    ("identity", "step", False): 1.15,
    ("identity", "step", True): 1.0,
    **{(form, phase, False): 1.3 for form in ("padded", "soft", NCHW) for phase in ("no grad", "step")},
}
Row = dict[str, Any]


class PlainAttention(nn.Module):
    """Multi-head attention of every token to every token, with which a call of ours is compared."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Takes a map `(N, H, W, dim)` and returns one of the same shape."""
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
    """One row per form: seconds of each module, and the fused module's launches and PyTorch operators.

    All modules of all forms take turns, so that what disturbs the machine affects all of them alike.
    """
    rows: dict[str, Row] = {}
    runs: dict[tuple[str, str], measure.Run] = {}
    for form in options.form:
        calls = calls_of(form, phase, options.compiled, device)
        counts = {"launches": launches_of(calls[OURS]), "operators": measure.operator_calls(calls[OURS])}
        rows[form] = {"form": form, "phase": phase, "compiled": options.compiled, **counts, "seconds": {}}
        runs |= {(form, name): call for name, call in calls.items()}
    for (form, name), seconds in measure.interleaved_minima(runs, device, options.repeats).items():
        rows[form]["seconds"][name] = seconds
    return list(rows.values())


def calls_of(form: str, phase: str, compiled: bool, device: torch.device) -> dict[str, measure.Run]:
    """A call of each module of a form; if `compiled`, without the einops reference."""
    problem = FORMS[form]
    x = torch.randn(problem.batch, problem.height, problem.width, problem.dim, device=device)
    modules = modules_of(form, device)
    if compiled:
        del modules[EINOPS]
    calls = {}
    for name, module in modules.items():
        if compiled:
            module.compile()
        is_nchw = form == NCHW and name != PLAIN
        calls[name] = measure.call_of(module, x.permute(0, 3, 1, 2).contiguous() if is_nchw else x, phase)
        calls[name]()
    return calls


def launches_of(run: measure.Run) -> int:
    """How many kernels of this package a call launches."""
    with mock.patch.object(Plan, "_launch", autospec=True, side_effect=Plan._launch) as launch:
        run()
    return sum(len(call.args[0].launches) for call in launch.call_args_list)


def report(rows: Sequence[Row]) -> str:
    """The rows as a table: times in us, and their ratios to the plain module's time."""
    cells = []
    for row in rows:
        seconds, plain = row["seconds"], row["seconds"][PLAIN]
        times = {f"{name} us": f"{1e6 * each:.0f}" for name, each in seconds.items()}
        ratios = {f"{name}/{PLAIN}": f"{each / plain:.2f}" for name, each in seconds.items()}
        counts = {key: row[key] for key in ("launches", "operators")}
        cells.append({"form": row["form"], "phase": row["phase"], **times, **ratios, **counts})
    return table("CPU time of a call, torch.compile" if rows[0]["compiled"] else "CPU time of a call", cells)


def missed(rows: Sequence[Row]) -> list[str]:
    """The targets that were measured and missed, in words."""
    seconds = {(row["form"], row["phase"], row["compiled"]): row["seconds"] for row in rows}
    failures = []
    for (form, phase, compiled), most in TARGETS.items():
        ours, identity = (seconds.get((each, phase, compiled)) for each in (form, "identity"))
        other = PLAIN if form == "identity" else OURS
        if ours and identity and not ours[OURS] <= most * identity[other]:
            what, ratio = f"{'compiled ' if compiled else ''}{form}, {phase}", ours[OURS] / identity[other]
            failures.append(f"{what}: {ratio:.2f} times identity {other}, must be at most {most}")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; with `--check` returns 1 if a target is missed."""
    options = _parse(arguments)
    device = measure.default_device()
    torch.set_num_threads(1)
    described = measure.circumstances(device)
    launcher = "its own driver" if device.type == "cuda" else "a stand-in for the driver"
    print(f"{measure.on_one_line(described)}\nlaunches by {launcher}; minima of {options.repeats} calls\n")
    context = contextlib.nullcontext() if device.type == "cuda" else stand_in.without_gpu()
    with context, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor warns about the machine
        rows = [row for phase in options.phase for row in measure_phase(phase, options, device)]
    print(report(rows))
    write_json(options.json, {"versions": described, "rows": rows})
    return conclude(missed(rows)) if options.check else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("host", __doc__, repeats=300)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--compiled", action="store_true", help="both modules under torch.compile")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    options = parser.parse_args(arguments)
    measured = {(form, phase, options.compiled) for form in options.form for phase in options.phase}
    if options.check and ("identity" not in options.form or measured.isdisjoint(TARGETS)):
        parser.error("--check needs --form identity and a --phase that has a target")
    return options
