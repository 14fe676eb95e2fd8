"""Times the kernels beside their peers.

Every peer is first held against the float64 definition; one that computes something else is refused and not
timed, and the exit status is 1. One that cannot run is reported, and the rest goes on. `peers` says what each
includes. Of two times, `work` is how long the GPU works (with a cold cache, launches hidden) and `call`
what a caller waits who waits for every call; on the CPU both are wall time. `rate` is the figure of merit:
the scores that count of a peer, over its work, beside dense attention's own (1.00: as fast a score).
"""

import argparse
import functools
import json
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bra_triton.bench import measure, module_times
from bra_triton.bench.peers import NAMES, Peer, dense_attention_in_parts, peers_for
from bra_triton.bench.problems import PROBLEMS, Problem
from bra_triton.bench.tables import table

INPUT_SETS = 4
PASSES = ("forward", "training")
FAILURES = ("refused", "error")
COMPACT = ("fused", "dense")  # if only these are asked for, a row of them is a line
# What the reference may hold in float64: 2 GiB of scores, and a few tensors as large.
MOST_SCORES = 1 << 28
# Peers know no K/V down-sampling and no routing weights.
CHOICES = [
    name
    for name, problem in PROBLEMS.items()
    if problem.kv_per_win is None and problem.routing_weight == "none"
]


Inputs = tuple[Tensor, Tensor]  # the packed projection and the output's gradient


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints every row as soon as it is known, and returns 1 if `wrong` finds anything."""
    options = _parse(arguments)
    if options.preset:
        return module_times.report(module_times.PRESET, options.repeats)
    rows: list[dict[str, Any]] = []

    def save(row: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps([*rows, row], indent=1) + "\n")

    is_compact = set(options.peers or ()) == set(COMPACT)
    problems = [PROBLEMS[name] for name in options.problem]
    for problem in [replace(each, batch=n) for each in problems for n in options.batch or [each.batch]]:
        row = measure_row(problem, options, save)
        print(line(row, is_first=not rows) if is_compact else report([row]), flush=True)
        rows.append(row)
    if is_compact:
        print("", *(f"- {reason}" for row in rows for reason in reasons(row)), sep="\n")
    if options.check_only:
        passes = [peer[which] for row in rows for peer in row["peers"].values() for which in PASSES]
        print(f"{sum('checked' in each for each in passes)} of {len(passes)} passes give the right result")
    found = [problem for row in rows for problem in wrong(row)]
    for failure in found:
        print(f"FAILED: {failure}")
    return 1 if found else 0


def measure_row(
    problem: Problem, options: argparse.Namespace, save: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """One row: a problem in a dtype, with all peers; `save` gets it again after every pass of a peer."""
    dtype, device = measure.DTYPES[options.dtype], torch.device(options.device)
    padding = torch.zeros(3 * problem.dim, dtype=dtype, device=device) if problem.grid.is_padded else None
    torch.manual_seed(0)
    inputs = [make_inputs(problem, dtype, device) for _ in range(INPUT_SETS)]
    qkv, grad_out = (_outer_images(x).double() for x in inputs[0])
    row: dict[str, Any] = {
        **{"problem": problem.name, "batch": problem.batch, "dtype": options.dtype, "device": device.type},
        "sizes": str(problem),
        "scores": {
            "routed": problem.scores_of_tokens(problem.topk * problem.kv_grid.region_tokens),
            "dense": problem.scores_of_tokens(problem.height * problem.width),
        },
        "versions": measure.circumstances(device),
        "peers": {},
    }
    peers = peers_for(problem, options.backend, padding, compile_flex=not options.no_compile)
    if options.peers:
        peers = {name: peer for name, peer in peers.items() if name in options.peers}
    if "flex" in peers and not options.no_compile:
        # Of one function PyTorch compiles 8 shapes and then none.
        torch.compiler.reset()

    @functools.cache
    def truth(is_dense: bool) -> dict[str, Tensor]:
        return _run(definition(problem, padding, is_dense), qkv, grad_out, "training")()

    for name, peer in peers.items():
        figures: dict[str, Any] = {"includes": peer.includes}
        row["peers"][name] = figures
        expected = functools.partial(truth, name == "dense")
        for which in PASSES:
            figures[which] = _figures_or_reason(peer, which, inputs, expected, options)
            save(row)
    return row


def definition(problem: Problem, padding: Tensor | None, is_dense: bool) -> Peer:
    """What is held against float64 inputs: the einops reference, or dense attention in parts.

    The reference's scores of the largest maps would fill the memory; there the torch backend serves, which
    keeps none.
    """
    if is_dense:
        attend = functools.partial(dense_attention_in_parts, num_heads=problem.num_heads)
        return Peer("dense attention", attend)
    scores = replace(problem, batch=min(problem.batch, 2)).useful_scores
    exact = peers_for(problem, "torch", None if padding is None else padding.double())
    return exact["reference" if scores <= MOST_SCORES else "fused"]


def _figures_or_reason(
    peer: Peer,
    which: str,
    inputs: list[Inputs],
    truth: Callable[[], dict[str, Tensor]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of a pass, or why there are none: `refused` for a wrong result, `error` for any other."""
    qkv, _ = inputs[0]
    try:
        runs = [_run(peer, *each, which) for each in inputs]
        found = {name: _outer_images(x) for name, x in runs[0]().items()}
        measure.check(found, truth(), measure.TOLERANCE[qkv.dtype])
        if options.check_only:
            return {"checked": True}
        return {
            "work_seconds": measure.median_device_seconds(runs, qkv.device, options.repeats),
            "call_seconds": measure.median_seconds(runs[0], qkv.device, options.repeats),
            "peak_bytes": measure.peak_bytes(runs[0], qkv.device),
        }
    except measure.WrongResultError as error:
        return {"refused": str(error)}
    except Exception as error:
        message = re.sub(r"\s+", " ", str(error)).strip()[:200]
        return {"error": f"{type(error).__name__}: {message}", "traceback": traceback.format_exc()}


def _run(peer: Peer, qkv: Tensor, grad_out: Tensor, which: str) -> Callable[[], dict[str, Tensor]]:
    """The pass as a function without arguments; returns the output, and in training the gradient."""
    if which == "forward":
        return torch.no_grad()(lambda: {"output": peer.attend(qkv)})
    qkv = qkv.detach().requires_grad_()

    def training() -> dict[str, Tensor]:
        out = peer.attend(qkv)
        return {"output": out.detach(), "gradient": torch.autograd.grad(out, qkv, grad_out)[0]}

    return training


def _outer_images(x: Tensor) -> Tensor:
    return x if len(x) < 3 else torch.stack((x[0], x[-1]))


def make_inputs(problem: Problem, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random tokens around random means of their regions, so that the chosen regions stand out."""
    grid, n_win = problem.grid, problem.n_win
    means = torch.randn(problem.batch, n_win, n_win, 3 * problem.dim, device=device)
    means = means.repeat_interleave(grid.region_height, 1).repeat_interleave(grid.region_width, 2)
    qkv = means[:, : problem.height, : problem.width]
    qkv = (qkv + torch.randn_like(qkv)).to(dtype).contiguous()
    return qkv, torch.randn_like(qkv[..., : problem.dim])


def reasons(row: dict[str, Any], counts: Callable[[str, str], bool] = lambda name, key: True) -> list[str]:
    """Why figures are missing, of those peers and of those `FAILURES` that count."""
    return [
        f"{row['problem']}, batch {row['batch']}, {name}, {which}: {peer[which][key]}"
        for name, peer in row["peers"].items()
        for which in PASSES
        for key in FAILURES
        if key in peer.get(which, {}) and counts(name, key)
    ]


def wrong(row: dict[str, Any]) -> list[str]:
    """The peers of a row that computed something else, and the fused one if it could not run."""
    return reasons(row, lambda name, key: key == "refused" or name == "fused")


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: times in ms, `x` how often the fused peer fits into them, `rate` as above."""
    parts = []
    for row in rows:
        cells: list[dict[str, object]] = []
        for name, peer in row["peers"].items():
            cells.append({"peer": name, "includes": peer["includes"]})
            for which in PASSES:
                cells[-1] |= _cells(name, which, row)
        title = f"{row['problem']}: {row['sizes']}, {row['dtype']}"
        parts += [table(title, cells, markdown=True), "", measure.on_one_line(row["versions"])]
        parts += [*(f"- {reason}" for reason in reasons(row)), ""]
    return "\n".join(parts)


def line(row: dict[str, Any], is_first: bool) -> str:
    """A line of the table of `COMPACT` peers, work in us; the first brings title and head of the table."""
    cells: dict[str, object] = {"problem": f"{row['problem']:16}", "batch": f"{row['batch']:5}"}
    for which in PASSES:
        figures = [row["peers"].get(name, {}).get(which, {}) for name in COMPACT]
        for name, each in zip(COMPACT, figures, strict=True):
            cells[f"{which}: {name}"] = f"{1e6 * each['work_seconds']:.1f}" if _timed(each) else _state(each)
        fused, dense = (each["work_seconds"] if _timed(each) else math.nan for each in figures)
        cells[f"{which}: dense/fused"] = f"{dense / fused:.2f}"
    lines = table(f"Work of the GPU in us, {row['dtype']}", [cells], markdown=True).splitlines()
    return "\n".join([measure.on_one_line(row["versions"]), "", *lines] if is_first else lines[-1:])


def _timed(figures: dict[str, Any]) -> bool:
    return "work_seconds" in figures


def _state(figures: dict[str, Any]) -> str:
    """Why there are no figures, in a word."""
    return next((key for key in (*FAILURES, "checked") if key in figures), "not run")


def _cells(name: str, which: str, row: dict[str, Any]) -> dict[str, object]:
    figures, fused, dense = (row["peers"].get(peer, {}).get(which, {}) for peer in (name, "fused", "dense"))
    if not _timed(figures):
        return {
            f"{which}: work": _state(figures),
            **{f"{which}: {each}": None for each in ("x", "rate", "call", "peak")},
        }
    work, rate = figures["work_seconds"], None
    if _timed(dense):
        scores = row["scores"]["dense" if name == "dense" else "routed"]
        rate = f"{scores / work / (row['scores']['dense'] / dense['work_seconds']):.2f}"
    return {
        f"{which}: work": f"{work * 1e3:.3f}",
        f"{which}: x": f"{work / fused['work_seconds']:.2f}" if _timed(fused) else None,
        f"{which}: rate": rate,
        f"{which}: call": f"{figures['call_seconds'] * 1e3:.3f}",
        f"{which}: peak": f"{figures['peak_bytes'] / 2**20:.1f} MiB",
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("bra-bench peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--problem", nargs="+", choices=CHOICES, metavar="PROBLEM", default=["tiny"])
    parser.add_argument("--preset", choices=["cpu"], help="whole modules on the CPU, held to their targets")
    parser.add_argument("--batch", nargs="+", type=int, help="images (default: the problem's)")
    parser.add_argument("--dtype", choices=measure.DTYPES, default="float16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--backend", help="fused backend (default: triton on a GPU, torch on the CPU)")
    parser.add_argument("--peers", nargs="+", choices=NAMES, metavar="PEER", help="only these (default: all)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="FlexAttention uncompiled")
    parser.add_argument("--check-only", action="store_true", help="check every peer, time none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if min([options.repeats, *(options.batch or [])]) < 1:
        parser.error("--batch and --repeats must be at least 1")
    options.backend = options.backend or ("triton" if options.device.startswith("cuda") else "torch")
    if "torch" in (options.peers or ()) and options.backend == "torch":
        parser.error("--peers torch: here that is the fused backend; it is a peer of triton's")
    return options
