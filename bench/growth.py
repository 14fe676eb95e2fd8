"""How time and memory of the attention grow with the map, `topk` and the batch, beside its peers.

Every point is a row of `bra-bench peers`: checked against float64, then timed. The exponent of a curve is the
slope of the straight line that fits the logarithms: 1 if the cost is proportional to the varied quantity, 2
if it is proportional to its square. With a fixed `n_win` the regions grow with the map, so the exponent of
routed attention approaches 2, too; its cost is then `topk / n_win**2` times that of dense attention.
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

# By sweep: the name of the varied quantity, and by its value the problems, which differ in nothing else.
SWEEPS: dict[str, tuple[str, dict[int, Problem]]] = {
    "map": ("tokens", {s * s: replace(BASE, height=s, width=s) for s in (32, 48, 64, 96, 128)}),
    "topk": ("topk", {k: replace(BASE, topk=k) for k in (1, 2, 4, 8, 16)}),
    "batch": ("images", {n: replace(SMALL, batch=n) for n in (1, 2, 4, 8)}),
}
# By figure: which pass of a row of `bra-bench peers`, and which number of that pass.
FIGURES = {
    "forward, ms": ("forward", "work ms"),
    "training, ms": ("training", "work ms"),
    "training, MiB": ("training", "peak MiB"),
}
Curves = dict[str, dict[int, float]]  # by peer and figure, then by the quantity's value


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and draws each sweep; returns 1 if a result is wrong or the fused peer fails."""
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
    """The curves of a sweep's rows; a point is left out if the peer has no such figure."""
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
    """The slope of the line that best fits the points' logarithms; NaN for fewer than two points."""
    if len(points) < 2:
        return math.nan
    logarithms = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(*logarithms).slope


def report(name: str, curves: Curves) -> str:
    """A sweep as a table: one row for each value of its quantity, and a last row with the exponents."""
    quantity, problems = SWEEPS[name]
    rows: list[dict[str, object]] = [
        {quantity: value}
        | {title: f"{points[value]:.1f}" if value in points else None for title, points in curves.items()}
        for value in problems
    ]
    exponents = {title: f"{exponent(points):.2f}" for title, points in curves.items()}
    rows.append({quantity: "exponent", **exponents})
    return table(f"{name}: {next(iter(problems.values()))} and larger", rows)


def draw(found: dict[str, Curves], path: Path) -> None:
    """Draws a picture of all sweeps, one row of plots for each, with logarithmic axes."""
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
