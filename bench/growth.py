"""How time and memory of the attention grow with the map, `topk` and the batch, beside its peers.

Every point is a row of `bra-bench peers`: checked against float64, then timed. Each curve's exponent is the
slope of a straight line through the logarithms: 1 where cost is proportional to what is varied, 2 where it is
proportional to its square. With a fixed `n_win` the regions grow with the map, so the cost of routed
attention approaches an exponent of 2, too, though at `topk / n_win**2` of dense attention's.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bra_triton.bench import measure, peer_times
from bra_triton.bench.problems import PROBLEMS, Problem
from bra_triton.bench.tables import table

PEERS = ["fused", "reference", "gather", "dense"]
BASE = replace(PROBLEMS["yolo_p3"], batch=1)
SMALL = replace(PROBLEMS["yolo_p4"], batch=1)


class Sweep(NamedTuple):
    """One quantity and the problems in which it, and nothing else, differs."""

    quantity: str
    problems: dict[int, Problem]  # by the quantity's value


SWEEPS = {
    "map": Sweep("tokens", {s * s: replace(BASE, height=s, width=s) for s in (32, 48, 64, 96, 128)}),
    "topk": Sweep("topk", {k: replace(BASE, topk=k) for k in (1, 2, 4, 8, 16)}),
    "batch": Sweep("images", {n: replace(SMALL, batch=n) for n in (1, 2, 4, 8)}),
}


class Figure(NamedTuple):
    """One of the figures of a row of `bra-bench peers`."""

    which: str
    key: str
    unit: str
    factor: float

    def __str__(self) -> str:
        return f"{self.which}, {self.unit}"


FIGURES = (
    Figure("forward", "work_seconds", "ms", 1e3),
    Figure("training", "work_seconds", "ms", 1e3),
    Figure("training", "peak_bytes", "MiB", 2**-20),
)
Curves = dict[Figure, dict[str, dict[int, float]]]  # figure -> peer -> value of the quantity -> figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table for each sweep and draws it; returns 1 where a result was wrong."""
    options = _parse(arguments)
    described = measure.circumstances(measure.default_device())
    print(measure.on_one_line(described))
    found, failures = {}, []
    for name in options.sweep:
        rows = {
            value: peer_times.measure_row(problem, options, lambda row: None)
            for value, problem in SWEEPS[name].problems.items()
        }
        failures += [failure for row in rows.values() for failure in peer_times.wrong(row)]
        found[name] = curves_of(rows)
        print(report(name, found[name]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    exponents = {
        name: {
            str(figure): {peer: exponent(points) for peer, points in peers.items()}
            for figure, peers in curves.items()
        }
        for name, curves in found.items()
    }
    (options.out / "growth.json").write_text(
        json.dumps({"versions": described, "exponents": exponents}, indent=2) + "\n"
    )
    draw(found, options.out / "growth.png")
    print(f"drawn: {options.out / 'growth.png'}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return int(bool(failures))


def curves_of(rows: dict[int, dict[str, Any]]) -> Curves:
    """The figures of a sweep's rows, without those that a peer does not have."""
    return {
        figure: {
            peer: {
                value: row["peers"][peer][figure.which][figure.key] * figure.factor
                for value, row in rows.items()
                if figure.key in row["peers"].get(peer, {}).get(figure.which, {})
            }
            for peer in PEERS
        }
        for figure in FIGURES
    }


def exponent(points: dict[int, float]) -> float:
    """The slope of the line that fits the logarithms best; NaN for fewer than two points."""
    if len(points) < 2:
        return math.nan
    logarithms = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(*logarithms).slope


def report(name: str, curves: Curves) -> str:
    """A sweep as text: a row for each value of its quantity, and one of exponents."""
    sweep = SWEEPS[name]
    rows: list[dict[str, object]] = []
    for value in sweep.problems:
        rows.append({sweep.quantity: value})
        for figure, peers in curves.items():
            for peer, points in peers.items():
                rows[-1][f"{peer} {figure}"] = f"{points[value]:.1f}" if value in points else None
    rows.append({sweep.quantity: "exponent"})
    for figure, peers in curves.items():
        rows[-1] |= {f"{peer} {figure}": f"{exponent(points):.2f}" for peer, points in peers.items()}
    return table(f"{name}: {next(iter(sweep.problems.values()))} and on", rows)


def draw(found: dict[str, Curves], path: Path) -> None:
    """All sweeps as one picture: a row each, with logarithmic axes."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(12, 3.5 * len(found)), layout="constrained")
    axes = picture.subplots(len(found), len(FIGURES), squeeze=False)
    for line, (name, curves) in zip(axes, found.items(), strict=True):
        for axis, (figure, peers) in zip(line, curves.items(), strict=True):
            for peer, points in peers.items():
                label = f"{peer}: exponent {exponent(points):.2f}"
                axis.plot(list(points), list(points.values()), marker="o", label=label)
            axis.set(xscale="log", yscale="log", xlabel=SWEEPS[name].quantity, title=str(figure))
            ticks = list(SWEEPS[name].problems)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    picture.savefig(path, dpi=80)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = measure.default_device().type == "cuda"
    parser = argparse.ArgumentParser("bra-bench growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--dtype", choices=measure.DTYPES, default="float16" if on_gpu else "float32")
    parser.add_argument("--repeats", type=int, default=3, help="calls, of which the median counts")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for picture and JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    options.device, options.backend = ("cuda", "triton") if on_gpu else ("cpu", "torch")
    options.peers, options.no_compile, options.check_only = PEERS, False, False
    return options
