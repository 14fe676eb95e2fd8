"""`bra-autotune`: finds the best tile configurations, by timing on a GPU or by prediction without one.

On a GPU it checks and times every configuration that is worth trying, and writes the fastest correct ones to
the user's cache, where later launches find them. A run that was stopped continues when it is started again.
Soft routing and padded maps have their own entries; hard routing shares soft routing's entry for dQ.

    bra-autotune                                        # all problems, forward and backward, float16
    bra-autotune --problem yolo_p3 --dtype bfloat16
    bra-autotune --routing-weight soft
    bra-autotune --refine                               # minutes: only the tiles in use and their variants
    bra-autotune --shape 16 80 80 64 --num-heads 2 --n-win 8 --topk 4 --kernel forward

With `--arch` it needs no GPU: it compiles the configurations, predicts their cost from the machine code and
writes the table that the package ships for that architecture:

    bra-autotune --arch sm_90 --head-dim 32 64
"""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bra_triton.bench.console import count, refuse_unused
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.measure import DTYPES
from bra_triton.bench.problems import MODELS, Problem
from bra_triton.bench.tuning import prediction, timing
from bra_triton.kernels import tiles
from bra_triton.kernels.tiles import cache as tile_cache
from bra_triton.kernels.tiles import table as tile_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `bra-autotune`; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    _refuse_unused(parser, args)
    if args.arch:
        for arch in args.arch:
            predict(args, arch)
        return 0
    try:
        problems = _problems(args)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no GPU; --arch predicts without one")
    measure(args, problems, torch.device("cuda"))
    return 0


def _refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    sizes = ("num_heads", "n_win", "topk")
    timed = ("problem", "shape", *sizes, "routing_weight", "refine", "save")
    for names, is_unused, reason in (
        (timed, args.arch, "with --arch, which times nothing"),
        (("head_dim",), not args.arch, "without --arch"),
        (("problem",), args.shape, "with --shape"),
        (sizes, not args.shape, "without --shape"),
        (("output",), not args.arch and not args.save, "without --arch or --save"),
    ):
        if is_unused:
            refuse_unused(parser, args, names, reason)


def predict(args: argparse.Namespace, arch: str) -> None:
    """Compiles and ranks the configurations for one architecture, and writes its table."""
    bits = sorted({8 * DTYPES[name].itemsize for name in args.dtype})
    sizes = itertools.product(args.kernel, bits, args.head_dim, tiles.SIZES, tiles.FORMS)
    keys = [tiles.Key(*each) for each in sizes]
    table, spilling = prediction.predict_table(keys, arch, args.workers)
    for key in keys:
        entry = table.entries[key]
        print(f"{arch} {key}: takes {entry.tile}, {entry.cost}")
    used = "the cheapest that spills is used, if there is one and no tile was measured"
    for key in spilling:
        print(f"{arch} {key}: every configuration spills, or none compiles; {used}")
    _write_table(table, args.output)


def measure(
    args: argparse.Namespace,
    problems: Sequence[Problem],
    device: torch.device,
    timer: timing.Timer = timing.device_milliseconds,
) -> None:
    """Times configurations on `device` and keeps the fastest in the user's cache, even if interrupted."""
    card = timing.card_name(device)
    # An update without entries: if the cache cannot be written, the warning comes before hours of timing.
    timing.keep(partial(tile_cache.update, card, {}))
    trials = timing.trials(problems, [DTYPES[name] for name in args.dtype], args.kernel, device, args.refine)
    results: dict[timing.Trial, float] = {}
    try:
        timing.time_all(trials, results, device, timer, args.workers)
        timing.time_all(timing.refinements(results), results, device, timer, args.workers)
    finally:
        found = timing.winners(results, trials)
        timing.keep(partial(tile_cache.update, card, found))
        tiles.forget()
    for key, entry in found.items():
        print(f"{key}: {entry.tile}  {entry.cost:.4f} ms")
    print(f"kept in {tile_cache.path()}")
    if args.save:
        shipped = tile_table.packaged(tiles.architecture_of(device))
        where = f"{card}, torch {torch.__version__}, Triton {tile_cache.triton_version()}"
        measured = {key: replace(entry, measured_on=where) for key, entry in found.items()}
        _write_table(replace(shipped, entries={**shipped.entries, **measured}), args.output)


def _write_table(table: tile_table.Table, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tile_cache.write_whole(folder / f"{table.arch}.json", tile_table.format_table(table))
    tiles.forget()


def _problems(args: argparse.Namespace) -> list[Problem]:
    if args.shape is None:
        return [replace(MODELS[name], routing_weight=args.routing_weight) for name in args.problem]
    missing = [f"--{n.replace('_', '-')}" for n in ("num_heads", "n_win", "topk") if not getattr(args, n)]
    if missing:
        raise ValueError(f"--shape needs {', '.join(missing)}")
    sizes = [*args.shape, args.num_heads, args.n_win, args.topk, args.routing_weight]
    problem = Problem("", *sizes)
    _ = problem.settings  # raises ValueError if the numbers do not fit each other
    return [problem]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bra-autotune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=["float16"], help="float16's tiles also serve bfloat16")
    add("--kernel", nargs="+", choices=tiles.KERNELS, default=list(tiles.KERNELS))
    shipped = Path(tile_table.__file__).parent / "tuned"
    add("--output", type=Path, default=shipped, help="folder of the tables that --arch and --save write")
    add("--workers", type=count, default=os.cpu_count() or 1, help="processes that compile")

    timed = parser.add_argument_group("on a GPU").add_argument
    timed("--problem", nargs="+", choices=MODELS, default=list(MODELS))
    sizes = ("N", "H", "W", "DIM")
    shape_help = "time a map of this size instead of --problem; needs --num-heads, --n-win and --topk"
    timed("--shape", nargs=4, type=count, metavar=sizes, help=shape_help)
    for name in ("--num-heads", "--n-win", "--topk"):
        timed(name, type=int)
    weight_help = "routing weight of the problems of --problem or --shape"
    timed("--routing-weight", choices=("none", "soft", "hard"), default="none", help=weight_help)
    timed("--refine", action="store_true", help="time only the tiles in use and their variants")
    timed("--save", action="store_true", help="also write the shipped table of the card's architecture")

    predicted = parser.add_argument_group("without a GPU").add_argument
    arch_help = "predict tables of these architectures instead of timing"
    predicted("--arch", nargs="+", choices=HARDWARE, help=arch_help)
    predicted("--head-dim", nargs="+", type=int, choices=tiles.HEAD_DIMS, default=list(tiles.HEAD_DIMS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
