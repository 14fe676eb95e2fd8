"""Times the kernels beside their peers.

Every peer is first compared with the float64 definition. A peer with a wrong result is refused and not timed,
and the exit status is 1. A peer that cannot run is reported, and the others go on. `peers.py` says what each
peer includes. There are two times: `work` is how long the GPU works (with a cold cache, without the time to
launch kernels), `call` is how long a caller waits until the result is there; on the CPU both are wall time.
`rate` compares the speed per score: a peer's useful scores per work, as a multiple of dense attention's.
"""

import argparse
import functools
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bra_triton.bench import measure, modules_alone
from bra_triton.bench.console import conclude, count, parser_of, refuse_unused, table, write_json
from bra_triton.bench.peers import NAMES, Peer, peers_for
from bra_triton.bench.problems import PROBLEMS, Problem

PASSES = ("forward", "training")
COMPACT = ("fused", "dense")  # if exactly these are asked for, a row is printed as one line
# The most scores that the reference may hold in float64: 2 GiB, and a few more tensors of this size.
MOST_SCORES = 1 << 28
CHOICES = [name for name, problem in PROBLEMS.items() if problem.is_plain]  # peers have no other modes
Inputs = tuple[Tensor, Tensor]  # the packed projection and the output's gradient
Pass = Callable[[], dict[str, Tensor]]  # returns the output and, in training, the gradient
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints every row as soon as it is known, and returns 1 if something is wrong."""
    options = _parse(arguments)
    if options.preset:
        return modules_alone.measure_preset(options.repeats, options.dtype)
    rows: list[Row] = []
    is_compact = set(options.peers or ()) == set(COMPACT)
    problems = [PROBLEMS[name] for name in options.problem]
    for problem in [replace(each, batch=n) for each in problems for n in options.batch or [each.batch]]:
        repeats = 0 if options.check_only else options.repeats
        row = measure_row(problem, options.dtype, options.peers or NAMES, repeats)
        print(line(row, is_first=not rows) if is_compact else report(row), flush=True)
        rows.append(row)
        write_json(options.json, rows)
    if is_compact:
        print("", *(f"- {reason}" for row in rows for reason in reasons(row)), sep="\n")
    if options.check_only:
        found = [peer[which]["status"] for row in rows for peer in row["peers"].values() for which in PASSES]
        print(f"{found.count('checked')} of {len(found)} passes give the right result")
    return conclude([failure for row in rows for failure in reasons(row, wrong=True)], "FAILED")


def measure_row(problem: Problem, dtype: str, names: Sequence[str], repeats: int) -> Row:
    """One row: the peers of a problem, checked and, unless `repeats` is 0, timed."""
    device = measure.default_device()
    torch.manual_seed(0)
    inputs = make_inputs(problem, measure.DTYPES[dtype], device)
    padding = inputs[0].new_zeros(3 * problem.dim) if problem.grid.is_padded else None
    qkv, grad_out = (_outer_images(x).double() for x in inputs)
    row: Row = {
        **{"problem": problem.name, "batch": problem.batch, "dtype": dtype, "sizes": str(problem)},
        # Keys of a token, as a share of its keys in dense attention.
        "keys": problem.topk * problem.grid.region_tokens / (problem.height * problem.width),
        "versions": measure.circumstances(device),
        "peers": {},
    }
    torch.compiler.reset()  # else FlexAttention is compiled for 8 shapes and no more

    @functools.cache
    def truth(is_dense: bool) -> dict[str, Tensor]:
        return _run(definition(problem, padding, is_dense), qkv, grad_out, "training")()

    peers = peers_for(problem, "triton" if device.type == "cuda" else "torch", padding)
    for name in [name for name in peers if name in names]:
        expected = functools.partial(truth, name == "dense")
        figures = {which: _figures(peers[name], which, inputs, expected, repeats) for which in PASSES}
        row["peers"][name] = {"includes": peers[name].includes, **figures}
    return row


def definition(problem: Problem, padding: Tensor | None, is_dense: bool) -> Peer:
    """The peer that computes the truth from float64 inputs.

    For dense attention it is the torch backend with a single region. Otherwise it is the einops reference or,
    if all scores would fill the memory, the torch backend, which does not hold them.
    """
    if is_dense:
        return peers_for(replace(problem, n_win=1, topk=1), "torch")["fused"]
    scores = replace(problem, batch=min(problem.batch, 2)).useful_scores
    exact = peers_for(problem, "torch", None if padding is None else padding.double())
    return exact["reference" if scores <= MOST_SCORES else "fused"]


def _figures(peer: Peer, which: str, inputs: Inputs, truth: Pass, repeats: int) -> dict[str, Any]:
    """The figures of a pass, or why there are none: "refused" for a wrong result, else "error"."""
    dtype, device = inputs[0].dtype, inputs[0].device
    try:
        run = _run(peer, *inputs, which)
        found = {name: _outer_images(x) for name, x in run().items()}
        measure.check(found, truth(), measure.TOLERANCE[dtype])
        if not repeats:
            return {"status": "checked"}
        return {
            "status": "timed",
            "work ms": 1e3 * measure.median_device_seconds(run, device, repeats),
            "call ms": 1e3 * median(measure.wall_seconds(run, device) for _ in range(repeats)),
            "peak MiB": measure.peak_bytes(run, device) / 2**20,
        }
    except measure.WrongResultError as error:
        return {"status": "refused", "why": str(error)}
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return {"status": "error", "why": why, "traceback": traceback.format_exc()}


def _run(peer: Peer, qkv: Tensor, grad_out: Tensor, which: str) -> Pass:
    """The pass as a function without arguments, which returns the output and, in training, the gradient."""
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


def reasons(row: Row, wrong: bool = False) -> list[str]:
    """Why figures are missing; with `wrong` only for wrong results, and for any failure of the fused peer."""
    return [
        f"{row['problem']}, batch {row['batch']}, {name}, {which}: {peer[which]['why']}"
        for name, peer in row["peers"].items()
        for which in PASSES
        if "why" in peer[which] and (peer[which]["status"] == "refused" or name == "fused" or not wrong)
    ]


def report(row: Row) -> str:
    """A row as Markdown: times in ms; `x`, the work over the fused peer's; `rate`, as explained above."""
    cells = [
        {"peer": name, "includes": peer["includes"]}
        | _cells(name, "forward", row)
        | _cells(name, "training", row)
        for name, peer in row["peers"].items()
    ]
    title = f"{row['problem']}: {row['sizes']}, {row['dtype']}"
    lines = [table(title, cells), "", measure.on_one_line(row["versions"])]
    return "\n".join([*lines, *(f"- {reason}" for reason in reasons(row)), ""])


def line(row: Row, is_first: bool) -> str:
    """A line of the table of `COMPACT` peers, work in us; the first is preceded by the title and the head."""
    cells: dict[str, object] = {"problem": f"{row['problem']:16}", "batch": f"{row['batch']:5}"}
    for which in PASSES:
        for name in COMPACT:
            cells[f"{which}: {name}"] = _work(name, which, row, 1e3, 1)
        fused, dense = (_milliseconds(name, which, row) for name in COMPACT)
        cells[f"{which}: dense/fused"] = f"{dense / fused:.2f}"
    lines = table(f"Work of the GPU in us, {row['dtype']}", [cells]).splitlines()
    return "\n".join([measure.on_one_line(row["versions"]), "", *lines] if is_first else lines[-1:])


def _cells(name: str, which: str, row: Row) -> dict[str, object]:
    figures = row["peers"][name][which]
    work, fused, dense = (_milliseconds(peer, which, row) for peer in (name, "fused", "dense"))
    rate = (1 if name == "dense" else row["keys"]) * dense / work
    shown = {
        "work": _work(name, which, row, 1, 3),
        "x": f"{work / fused:.2f}",
        "rate": f"{rate:.2f}",
        "call": f"{figures.get('call ms', math.nan):.3f}",
        "peak": f"{figures.get('peak MiB', math.nan):.1f} MiB",
    }
    return {f"{which}: {key}": "" if text.startswith("nan") else text for key, text in shown.items()}


def _milliseconds(name: str, which: str, row: Row) -> float:
    """Milliseconds of work of a peer's pass; NaN if it was not timed."""
    figures = row["peers"][name][which] if name in row["peers"] else {}
    return float(figures.get("work ms", math.nan))


def _work(name: str, which: str, row: Row, factor: float, digits: int) -> str:
    """`factor` times the milliseconds of work as text; for a pass that was not timed, its status."""
    text = f"{factor * _milliseconds(name, which, row):.{digits}f}"
    return str(row["peers"][name][which]["status"]) if text == "nan" else text


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = parser_of("peers", __doc__, repeats=30)
    add = parser.add_argument
    add("--problem", nargs="+", choices=CHOICES, metavar="PROBLEM", default=["tiny"])
    add("--preset", choices=["cpu"], help="whole modules on the CPU; in float32, compared with their targets")
    add("--batch", nargs="+", type=count, help="images in a batch (default: the problem's)")
    add("--dtype", choices=measure.DTYPES, help="default: float32 on a CPU, float16 on a GPU")
    add("--peers", nargs="+", choices=NAMES, metavar="PEER", help="only these (default: all)")
    add("--check-only", action="store_true", help="check every peer, time none")
    options = parser.parse_args(arguments)
    if options.preset:
        fixed = ("json", "problem", "batch", "peers", "check_only")
        refuse_unused(parser, options, fixed, "with --preset, which sets what is measured")
    if "torch" in (options.peers or ()) and not on_gpu:
        parser.error("--peers torch needs a GPU: without one, the torch backend is the fused peer")
    options.dtype = options.dtype or ("float16" if on_gpu and not options.preset else "float32")
    return options
