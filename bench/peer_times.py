"""Times the kernels beside their peers.

Every peer is first held against the float64 definition; one that computes something else is refused and not
timed, and the exit status is 1. One that cannot run is reported, and the rest goes on. `peers` says what each
includes. Of two times, `work` is how long the GPU works (with a cold cache, launches hidden) and `call`
what a caller waits who waits for every call; on the CPU both are wall time. `rate` is the figure of merit:
the scores that count of a peer, over its work, beside dense attention's own (1.00: as fast a score).
"""

import argparse
import json
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bra_triton.bench import measure, module_times
from bra_triton.bench.peers import Peer, peers_for
from bra_triton.bench.problems import PROBLEMS, Problem
from bra_triton.bench.tables import table

INPUT_SETS = 4
PASSES = ("forward", "training")
FAILURES = ("refused", "error")
# Peers know no K/V down-sampling and no routing weights.
CHOICES = [
    name
    for name, problem in PROBLEMS.items()
    if problem.kv_per_win is None and problem.routing_weight == "none"
]


Inputs = tuple[Tensor, Tensor]  # the packed projection and the output's gradient


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes one JSON file a row; returns 1 if `wrong` finds anything."""
    options = _parse(arguments)
    if options.preset:
        return module_times.report(module_times.PRESET, options.repeats)

    def save(row: dict[str, Any]) -> None:
        if options.out:
            path = options.out / file_name(row["problem"], row["batch"], row["dtype"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row, indent=2) + "\n")

    rows = []
    for name in options.problem:
        problem = PROBLEMS[name]
        rows.append(measure_row(replace(problem, batch=options.batch or problem.batch), options, save))
    print(report(rows))
    found = [problem for row in rows for problem in wrong(row)]
    for failure in found:
        print(f"FAILED: {failure}")
    return 1 if found else 0


def file_name(problem: str, batch: int | str, dtype: str) -> str:
    """Name of a row's file in the folder `--out`."""
    return f"{problem}-batch{batch}-{dtype}.json"


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
    exact = peers_for(problem, "torch", None if padding is None else padding.double())
    peers = peers_for(problem, options.backend, padding, compile_flex=not options.no_compile)
    for name, peer in peers.items():
        if options.peers and name not in options.peers:
            continue
        figures: dict[str, Any] = {"includes": peer.includes}
        row["peers"][name] = figures
        truth = _run(exact["dense" if name == "dense" else "reference"], qkv, grad_out, "training")()
        for which in PASSES:
            figures[which] = _figures_or_reason(peer, which, inputs, truth, options)
            save(row)
    return row


def _figures_or_reason(
    peer: Peer, which: str, inputs: list[Inputs], truth: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a pass, or why there are none: `refused` for a wrong result, `error` for any other."""
    qkv, _ = inputs[0]
    try:
        runs = [_run(peer, *each, which) for each in inputs]
        found = {name: _outer_images(x) for name, x in runs[0]().items()}
        measure.check(found, truth, measure.TOLERANCE[qkv.dtype])
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


def wrong(row: dict[str, Any]) -> list[str]:
    """The peers of a row that computed something else, and the fused one if it could not run."""
    return [
        f"{row['problem']}, {name}, {which}: {peer[which][key]}"
        for name, peer in row["peers"].items()
        for which in PASSES
        for key in FAILURES
        if key in peer.get(which, {}) and (key == "refused" or name == "fused")
    ]


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: times in ms, `x` how often the fused peer fits into them, `rate` as above."""
    parts = []
    for row in rows:
        cells, reasons = [], []
        for name, peer in row["peers"].items():
            cells.append({"peer": name, "includes": peer["includes"]})
            for which in PASSES:
                figures = peer.get(which, {})
                cells[-1] |= _cells(name, which, row)
                reasons += [f"- {name}, {which}: {figures[key]}" for key in FAILURES if key in figures]
        title = f"{row['problem']}: {row['sizes']}, {row['dtype']}"
        parts += [table(title, cells, markdown=True), "", measure.on_one_line(row["versions"]), *reasons, ""]
    return "\n".join(parts)


def _cells(name: str, which: str, row: dict[str, Any]) -> dict[str, object]:
    figures, fused, dense = (row["peers"].get(peer, {}).get(which, {}) for peer in (name, "fused", "dense"))
    if "work_seconds" not in figures:
        state = next((key for key in (*FAILURES, "checked") if key in figures), "not run")
        return {
            f"{which}: work": state,
            **{f"{which}: {each}": None for each in ("x", "rate", "call", "peak")},
        }
    work, rate = figures["work_seconds"], None
    if "work_seconds" in dense:
        scores = row["scores"]["dense" if name == "dense" else "routed"]
        rate = f"{scores / work / (row['scores']['dense'] / dense['work_seconds']):.2f}"
    return {
        f"{which}: work": f"{work * 1e3:.3f}",
        f"{which}: x": f"{work / fused['work_seconds']:.2f}" if "work_seconds" in fused else None,
        f"{which}: rate": rate,
        f"{which}: call": f"{figures['call_seconds'] * 1e3:.3f}",
        f"{which}: peak": f"{figures['peak_bytes'] / 2**20:.1f} MiB",
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("bra-bench peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--problem", nargs="+", choices=CHOICES, metavar="PROBLEM", default=["tiny"])
    parser.add_argument("--preset", choices=["cpu"], help="whole modules on the CPU, held to their targets")
    parser.add_argument("--batch", type=int, help="images (default: the problem's)")
    parser.add_argument("--dtype", choices=measure.DTYPES, default="float16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--backend", help="fused backend (default: triton on a GPU, torch on the CPU)")
    parser.add_argument("--peers", nargs="+", help="only these (default: all)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="FlexAttention uncompiled")
    parser.add_argument("--check-only", action="store_true", help="check every peer, time none")
    parser.add_argument("--out", type=Path, help="folder for the JSON files")
    options = parser.parse_args(arguments)
    if (options.batch is not None and options.batch < 1) or options.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    options.backend = options.backend or ("triton" if options.device.startswith("cuda") else "torch")
    return options
