"""Times tile configurations on the card at hand: only correct ones, by medians, with cold caches.

Kernels are compiled beforehand, in many processes. Every configuration is timed within a whole forward or
backward of the attention, including the lists. Timings are kept, and a run that was stopped continues there.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from bra_triton.backend import torch as torch_kernels
from bra_triton.bench import measure
from bra_triton.bench.console import progress
from bra_triton.bench.machine_code.launches import launch_with, plan_pass, variant
from bra_triton.bench.machine_code.static_analysis import compile_for, in_processes
from bra_triton.bench.problems import Problem
from bra_triton.bench.tuning.search_space import DEEP_STAGES, EXP_SHARE, candidates, serves
from bra_triton.kernels import tiles
from bra_triton.kernels.forms import ROUTED, use_form
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Needs, PackedAttention
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT, Key, Tile
from bra_triton.kernels.tiles import cache as tile_cache
from bra_triton.kernels.tiles.table import Entry

KEPT = "timings.jsonl"  # finished trials, in the folder of the user's cache
Run = Callable[[], dict[str, Tensor]]
Timer = Callable[[Run], float]  # milliseconds of a run


@dataclass(frozen=True)
class Trial:
    """One configuration to time."""

    problem: Problem
    dtype: torch.dtype
    kernel: str
    tile: Tile

    @property
    def key(self) -> Key:
        """The entry of the table for which it competes."""
        problem = self.problem
        grid = problem.kv_grid if self.kernel == KEY_VALUE_GRADIENT else problem.grid
        tokens = (grid.merged if problem.settings.chooses_all else grid).region_tokens
        # With hard routing there is no factor, but dQ computes the gradient that a factor would get.
        weighting = ("soft", "hard") if self.kernel == QUERY_GRADIENT else ("soft",)
        is_weighted = problem.routing_weight in weighting
        form = tiles.tile_form(problem.head_dims, problem.grid.is_padded, 1, is_weighted)
        return Key.of(self.kernel, 8 * self.dtype.itemsize, max(problem.head_dims), tokens, form)

    def __str__(self) -> str:
        return f"{self.problem} {str(self.dtype)[6:]} {self.kernel} {self.tile}"


def trials(
    problems: Sequence[Problem],
    dtypes: Sequence[torch.dtype],
    kernels: Sequence[str],
    device: torch.device,
    only_used: bool = False,
) -> list[Trial]:
    """All configurations to time: those that launches get now and, unless `only_used`, those worth trying."""
    found = []
    for dtype, problem, kernel in itertools.product(dtypes, problems, kernels):
        so_far = Trial(problem, dtype, kernel, Tile(16, 16, 1, 1))  # the key does not depend on the tile
        key = so_far.key
        used = tiles.choose(kernel, dtype, key.head_dim, key.size, device, key.form)
        stages = () if only_used else (1,) if torch.version.hip else (3, 2)
        space = [t for n in stages for t in candidates(kernel, key.bits, key.head_dim, n)]
        fitting = [tile for tile in space if serves(tile, key.size)]
        # For the widest heads there are only tiles that are too small for `serves`.
        found += [replace(so_far, tile=tile) for tile in dict.fromkeys([used, *(fitting or space)])]
    return found


def refinements(results: Mapping[Trial, float]) -> list[Trial]:
    """What to time next: the variants of the fastest tile of every entry, see `variants`."""
    best = winners(results)
    return [
        refined
        for trial in results
        if trial.key in best and trial.tile == best[trial.key].tile
        for tile in variants(trial.kernel, 8 * trial.dtype.itemsize, trial.tile)
        if (refined := replace(trial, tile=tile)) not in results
    ]


def variants(kernel: str, bits: int, tile: Tile) -> list[Tile]:
    """Variants of a tile: with or without exponentials by multiply-adds, LePE in or out, deeper pipelines."""
    found = [tile]
    if bits == 16 and kernel != KEY_VALUE_GRADIENT and tile.step >= 8 * EXP_SHARE:
        found.append(replace(tile, exp_share=0 if tile.exp_share else EXP_SHARE))
    if kernel == FORWARD:
        found += [replace(each, fuses_lepe=not each.fuses_lepe) for each in found]
    if not torch.version.hip:
        found += [replace(tile, num_stages=n) for n in DEEP_STAGES if n != tile.num_stages]
    return found[1:]


class Inputs:
    """The inputs of one problem, and the results that its passes must have."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        self.problem, self.dtype = problem, dtype
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        # Region queries and keys are given: if each pass computed its own, rounding could change the routing.
        means = draw(problem.batch, problem.grid.n_regions, 2 * problem.qk_dim, dtype=torch.float32)
        self.attention = problem.attention(draw, means)
        self.grad_out = draw(problem.batch, problem.height, problem.width, problem.dim)
        forward, _ = self._plans()
        self.kept = forward.run(*self.attention.tensors)[-1]
        self.expected = self._expected()

    def run_of(self, kernel: str) -> Run:
        """A pass that launches the kernel, with the tiles in force now; it returns its results by name."""
        (forward, backward), tensors = self._plans(), self.attention.tensors
        if kernel == FORWARD:
            return lambda: {"output": forward.run(*tensors)[0]}
        return lambda: self._gradients(*backward.run(*tensors, self.grad_out, None, self.kept))

    @use_form(ROUTED)  # the tiles of masked and small-map attention are in no table
    def _plans(self) -> tuple[Plan, Plan]:
        return plan_pass(self.attention)

    def check(self, run: Run) -> None:
        """Raises WrongResultError if a run computes wrong results."""
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        try:
            measure.check(run(), self.expected, measure.TOLERANCE[self.dtype])
        finally:
            torch.use_deterministic_algorithms(False)

    def _gradients(self, grad_qkv: Tensor, *others: Any) -> dict[str, Tensor]:
        """The gradients of a pass by name; `others` begin with that of the means if the routing learns."""
        qk_dim, means = self.problem.qk_dim, others[:1] if self.problem.settings.diff_routing else ()
        parts = grad_qkv.split((qk_dim, qk_dim, self.problem.dim), dim=-1)
        return dict(zip(("dQ", "dK", "dV", "dR"), (*parts, *means), strict=False))

    def _expected(self) -> dict[str, Tensor]:
        single = [None if x is None else x.float() for x in self.attention.tensors]
        exact = PackedAttention.of(single, self.problem.settings)
        out, saved = torch_kernels.attend(exact, trains=True)
        found = torch_kernels.attend_backward(self.grad_out.float(), exact, None, saved, Needs(means=True))
        return {"output": out} | self._gradients(found.qkv, found.means)


def time_all(
    todo: Sequence[Trial], results: dict[Trial, float], device: torch.device, timer: Timer, workers: int = 1
) -> None:
    """Adds the milliseconds of every trial to `results`; infinite if it does not run or is wrong.

    A trial's time is added as soon as it is known. Finished trials are kept, and those that an earlier run
    has kept are not timed again. Trials of the same problem and dtype must follow each other. On a GPU,
    several `workers` compile the kernels beforehand; with 1, each trial compiles its kernel.
    """
    results.update(_read_kept(todo, device))
    left = [trial for trial in todo if trial not in results]
    if left and workers > 1 and device.type == "cuda":
        compile_ahead(left, tiles.architecture_of(device), workers)
    inputs: Inputs | None = None
    for done, trial in enumerate(left, 1):
        if inputs is None or (inputs.problem, inputs.dtype) != (trial.problem, trial.dtype):
            inputs = None  # frees the last problem's memory first
            inputs = Inputs(trial.problem, trial.dtype, device)
        milliseconds, refusal = _time(trial, inputs, timer)
        results[trial] = milliseconds
        row = {"trial": str(trial), "milliseconds": milliseconds, "why": refusal}
        keep(partial(_note, tile_cache.circumstances(card_name(device), trial.kernel) | row))
        progress(done, len(left), f"{trial.kernel} {trial.tile}: {refusal or f'{milliseconds:.4f} ms'}")
        if "CUDA error" in refusal or "HIP error" in refusal:
            why = f"{trial} broke the GPU's context ({refusal})"
            raise RuntimeError(f"{why}; the refusal is recorded; run the command again to continue")


def winners(results: Mapping[Trial, float], todo: Sequence[Trial] = ()) -> dict[Key, Entry]:
    """The fastest tile of every entry whose trials in `todo` are all finished, with its mean milliseconds."""
    unfinished = {trial.key for trial in todo if trial not in results}
    found = {}
    for key, by_tile in means(results).items():
        tile = min(by_tile, key=by_tile.__getitem__)
        if key not in unfinished and math.isfinite(by_tile[tile]):
            found[key] = Entry(tile, round(by_tile[tile], 4))
    return found


def means(results: Mapping[Trial, float]) -> dict[Key, dict[Tile, float]]:
    """For every entry the tiles that were timed on all of its problems, and their mean milliseconds.

    The means are geometric, so that slow and fast problems weigh the same, and infinite if one is refused.
    """
    by_key: dict[Key, dict[Tile, list[float]]] = {}
    for trial, milliseconds in results.items():
        by_key.setdefault(trial.key, {}).setdefault(trial.tile, []).append(milliseconds)
    most = {key: max(map(len, by_tile.values())) for key, by_tile in by_key.items()}
    return {
        key: {tile: geometric_mean(times) for tile, times in by_tile.items() if len(times) == most[key]}
        for key, by_tile in by_key.items()
    }


def device_milliseconds(run: Run) -> float:
    """Median milliseconds that the GPU works on a run; its cache is overwritten before each call."""
    return 1e3 * measure.median_device_seconds(run, torch.device("cuda"))


def compile_ahead(todo: Sequence[Trial], arch: str, workers: int) -> None:
    """Fills Triton's cache on disk, in several processes; a kernel that fails is noted when it is timed."""
    launches = [launch_with(trial.tile, trial.kernel, trial.problem, trial.dtype) for trial in todo]
    jobs = {variant(launch): (launch, arch) for launch in launches}
    try:
        in_processes(compile_for, jobs, workers)
    except BrokenProcessPool as error:
        print(f"\ncompiling ahead ended early, the rest is compiled when timed: {error}", file=sys.stderr)


def _time(trial: Trial, inputs: Inputs, timer: Timer) -> tuple[float, str]:
    """Milliseconds of a trial, or infinity and the reason why it is refused."""
    with tiles.use_tiles({trial.kernel: trial.tile}):
        try:
            run = inputs.run_of(trial.kernel)
            inputs.check(run)
            return timer(run), ""
        except Exception as failure:  # a wrong result, or one of the compiler's and the GPU's many errors
            return math.inf, f"refused: {type(failure).__name__}: {failure}"[:200]


def card_name(device: torch.device) -> str:
    """Name of the card, as the cache knows it; "cpu" under the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def keep(write: Callable[[], object]) -> None:
    """Calls `write`; if the user's cache cannot be written, retries with a temporary folder as the cache."""
    try:
        write()
    except OSError as error:
        full, aside = tile_cache.folder(), tempfile.mkdtemp(prefix="bra_triton_")
        os.environ["BRA_TRITON_CACHE"] = aside
        print(
            f"\nwarning: cannot write {full}: {error}; what is measured from now on is kept in {aside}. "
            "Launches find it there while BRA_TRITON_CACHE names that folder.",
            file=sys.stderr,
        )
        write()


def _note(row: Mapping[str, object]) -> None:
    with (tile_cache.folder() / KEPT).open("a") as file:
        # The line break comes first: it ends a line that a stopped run or a full disk has left half written.
        file.write(f"\n{json.dumps(row)}")


def _read_kept(todo: Sequence[Trial], device: torch.device) -> dict[Trial, float]:
    by_name, kept = {str(trial): trial for trial in todo}, tile_cache.folder() / KEPT
    results = {}
    for line in kept.read_text("utf-8", "replace").splitlines() if kept.exists() else []:
        # Skip lines of other trials, half-written lines, and lines without a result: these are timed again.
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            row = json.loads(line)
            trial = by_name[row["trial"]]
            if tile_cache.circumstances(card_name(device), trial.kernel).items() <= row.items():
                results[trial] = float(row["milliseconds"])
    return results
