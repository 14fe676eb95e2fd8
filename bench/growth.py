"""How time and memory of the attention grow with the map, `topk` and the batch, beside its peers.

Every point is a row of `bra-bench peers`: checked against float64, then timed. Each curve's exponent is the
slope of a straight line through the logarithms: 1 where cost is proportional to what is varied, 2 where it is
proportional to its square. With a fixed `n_win` the regions grow with the map, so the cost of routed
attention approaches an exponent of 2, too, though at `topk / n_win**2` of dense attention's.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bra_triton.bench import measure, peer_times
from bra_triton.bench.console import conclude, parser_of, table
from bra_triton.bench.problems import PROBLEMS, Problem

PEERS = ["fused", "reference", "gather", "dense"]
BASE = replace(PROBLEMS["yolo_p3"], batch=1)
SMALL = replace(PROBLEMS["yolo_p4"], batch=1)


# The quantity, and the problems in which it, and nothing else, differs, by its value.
SWEEPS: dict[str, tuple[str, dict[int, Problem]]] = {
    "map": ("tokens", {s * s: replace(BASE, height=s, width=s) for s in (32, 48, 64, 96, 128)}),
    "topk": ("topk", {k: replace(BASE, topk=k) for k in (1, 2, 4, 8, 16)}),
    "batch": ("images", {n: replace(SMALL, batch=n) for n in (1, 2, 4, 8)}),
}
# Of a row of `bra-bench peers`: which pass, and which of its numbers.
FIGURES = {
    "forward, ms": ("forward", "work ms"),
    "training, ms": ("training", "work ms"),
    "training, MiB": ("training", "peak MiB"),
}
Curves = dict[str, dict[int, float]]  # by peer and figure: by value of the quantity


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table for each sweep and draws it; returns 1 where a result was wrong."""
    dtype = "float16" if measure.default_device().type == "cuda" else "float32"
    parser = parser_of("growth", __doc__, repeats=3, has_json=False)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for the picture")
    options = parser.parse_args(arguments)
    print(measure.on_one_line(measure.circumstances(measure.default_device())))
    found, failures = {}, []
    for name in options.sweep:
        rows = {
            value: peer_times.measure_row(problem, dtype, PEERS, options.repeats)
            for value, problem in SWEEPS[name][1].items()
        }
        failures += [failure for row in rows.values() for failure in peer_times.reasons(row, wrong=True)]
        found[name] = curves_of(rows)
        print(report(name, found[name]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, options.out / "growth.png")
    print(f"drawn: {options.out / 'growth.png'}")
    return conclude(failures, "FAILED")


def curves_of(rows: dict[int, peer_times.Row]) -> Curves:
    """The figures of a sweep's rows, without those that a peer does not have."""
    return {
        f"{peer} {figure}": {
            value: row["peers"][peer][which][key]
            for value, row in rows.items()
            if key in row["peers"][peer][which]
        }
        for figure, (which, key) in FIGURES.items()
        for peer in PEERS
    }


def exponent(points: dict[int, float]) -> float:
    """The slope of the line that fits the logarithms best; NaN for fewer than two points."""
    if len(points) < 2:
        return math.nan
    logarithms = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(*logarithms).slope


def report(name: str, curves: Curves) -> str:
    """A sweep as text: a row for each value of its quantity, and one of exponents."""
    quantity, problems = SWEEPS[name]
    rows: list[dict[str, object]] = [
        {quantity: value}
        | {title: f"{points[value]:.1f}" if value in points else None for title, points in curves.items()}
        for value in problems
    ]
    exponents = {title: f"{exponent(points):.2f}" for title, points in curves.items()}
    rows.append({quantity: "exponent", **exponents})
    return table(f"{name}: {next(iter(problems.values()))} and on", rows)


def draw(found: dict[str, Curves], path: Path) -> None:
    """All sweeps as one picture: a row each, with logarithmic axes."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 3.5 * len(found)), layout="constrained")
    axes = picture.subplots(len(found), len(FIGURES), squeeze=False)
    for line, (name, curves) in zip(axes, found.items(), strict=True):
        quantity, problems = SWEEPS[name]
        for axis, figure in zip(line, FIGURES, strict=True):
            for peer in PEERS:
                points = curves[f"{peer} {figure}"]
                label = f"{peer}: exponent {exponent(points):.2f}"
                axis.plot(list(points), list(points.values()), marker="o", label=label)
            axis.set(xscale="log", yscale="log", xlabel=quantity, title=figure)
            axis.set_xticks(list(problems), [*map(str, problems)])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    picture.savefig(path, dpi=80)
