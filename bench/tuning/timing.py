"""Times tile configurations on the card at hand: correct ones alone, by medians, with cold caches.

Every configuration is timed within a whole forward or backward of the attention, its lists included: what
they add is the same for all. Results of finished ones are kept, so that a stopped run goes on where it was.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bra_triton.backend import torch_backend
from bra_triton.bench.machine_code.launches import Setting
from bra_triton.bench.tuning.search_space import EXP_SHARE, candidates, serves
from bra_triton.kernels import tile_cache, tiles
from bra_triton.kernels.launches import attention
from bra_triton.kernels.problem import Gradients, Lepe, Padding, RoutedAttention, SmallGradients
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT, Key, Tile

PASSES = {
    "forward": (FORWARD,),
    "backward": (QUERY_GRADIENT, KEY_VALUE_GRADIENT),
    "both": (FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT),
}
# Relative error against float32 that rounding explains; a wrong index is off by about 1.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Inputs are drawn in so many sets that they do not all stay in a cache.
_SETS, _SET_BYTES = (2, 8), 256 << 20

# Milliseconds of `run(i)`, with `i` the number of an input set.
Timer = Callable[[Callable[[int], object], int], float]


@dataclass(frozen=True)
class Trial:
    """One configuration to time."""

    setting: Setting
    dtype: torch.dtype
    kernel: str
    tile: Tile

    @property
    def key(self) -> Key:
        """The entry that it competes for."""
        s = self.setting
        grid = s.kv_grid if self.kernel == KEY_VALUE_GRADIENT else s.grid
        heads = (s.qk_head_dim, s.v_head_dim)
        # Hard routing has a factor of 1 that is not there, but for its gradient.
        weighting = ("soft", "hard") if self.kernel == QUERY_GRADIENT else ("soft",)
        form = tiles.form_of(heads, s.grid.is_padded, 1, s.routing_weight in weighting)
        return Key.of(self.kernel, 8 * self.dtype.itemsize, max(heads), grid.region_tokens, form)

    def __str__(self) -> str:
        return f"{self.setting} {self.dtype} {self.kernel} {self.tile}"


def trials(
    settings: Sequence[Setting], dtype: torch.dtype, kernels: Sequence[str], device: torch.device
) -> list[Trial]:
    """All configurations to time: those worth trying, and what launches get so far."""
    found = []
    for setting in settings:
        for kernel in kernels:
            so_far = Trial(setting, dtype, kernel, Tile(16, 16, 1, 1))  # the key does not depend on the tile
            key = so_far.key
            head_dim = max(setting.qk_head_dim, setting.v_head_dim)
            used = tiles.choose(kernel, dtype, head_dim, key.size, device, key.form)
            stages = (1,) if torch.version.hip else (3, 2)
            space = [t for n in stages for t in candidates(kernel, key.bits, key.head_dim, n)]
            fitting = [tile for tile in space if serves(tile, key.size)]
            # Of the widest heads only small tiles fit.
            tried = dict.fromkeys([used, *(fitting or space)])
            found += [replace(so_far, tile=tile) for tile in tried]
    return found


def refinements(results: Mapping[Trial, float]) -> list[Trial]:
    """What to time next: the fastest tile of every entry with what else a kernel leaves to the table."""
    best = winners(results)
    return [
        refined
        for trial in results
        if trial.key in best and trial.tile == best[trial.key][0]
        for tile in variants(trial.kernel, 8 * trial.dtype.itemsize, trial.tile)
        if (refined := replace(trial, tile=tile)) not in results
    ]


def variants(kernel: str, bits: int, tile: Tile) -> list[Tile]:
    """A tile with a share of its exponentials evaluated by multiply-adds, and with LePE the other way."""
    found = [tile]
    if bits == 16 and kernel != KEY_VALUE_GRADIENT and tile.step >= 8 * EXP_SHARE:
        found.append(replace(tile, exp_share=0 if tile.exp_share else EXP_SHARE))
    if kernel == FORWARD:
        found += [replace(each, fuses_lepe=not each.fuses_lepe) for each in found]
    return found[1:]


def time_all(todo: Sequence[Trial], device: torch.device, timer: Timer, kept: Path) -> dict[Trial, float]:
    """Milliseconds of every trial; infinite for what does not run or computes something else.

    Args:
        todo: trials, those of a setting together.
        device: the card, or the CPU under the interpreter.
        timer: see `cuda_milliseconds`.
        kept: file of finished trials under these circumstances, which this run continues.
    """
    results = _read_kept(kept, todo, device)
    left = [trial for trial in todo if trial not in results]
    kept.parent.mkdir(parents=True, exist_ok=True)
    inputs: _Inputs | None = None
    for done, trial in enumerate(left, 1):
        if inputs is None or inputs.setting != trial.setting:
            inputs = None  # frees the last setting's memory first
            inputs = _Inputs(trial.setting, trial.dtype, device)
        milliseconds, refusal = _time(trial, inputs, timer)
        results[trial] = milliseconds
        row = {
            **_circumstances(device, trial),
            "trial": str(trial),
            "milliseconds": milliseconds,
            "why": refusal,
        }
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = refusal or f"{milliseconds:.4f} ms"
        progress = f"[{done}/{len(left)}] {trial.kernel} {trial.tile}: {shown}"
        print(f"\r{progress:<100.100}", end="", file=sys.stderr, flush=True)
        if "CUDA error" in refusal or "HIP error" in refusal:
            raise RuntimeError(
                f"{trial} broke the GPU's context ({refusal}); it is noted, run again to go on"
            )
    if left:
        print(file=sys.stderr)
    return results


def winners(results: Mapping[Trial, float]) -> dict[Key, tuple[Tile, float]]:
    """For every entry the tile that is fastest over the settings that share it, and its mean milliseconds.

    Settings weigh the same whatever they take: by geometric means. A tile that one of them refused is out.
    """
    by_key: dict[Key, dict[Tile, list[float]]] = {}
    for trial, milliseconds in results.items():
        by_key.setdefault(trial.key, {}).setdefault(trial.tile, []).append(milliseconds)
    best = {}
    for key, by_tile in by_key.items():
        most = max(map(len, by_tile.values()))
        means = {tile: _geometric_mean(times) for tile, times in by_tile.items() if len(times) == most}
        tile = min(means, key=means.__getitem__)
        if math.isfinite(means[tile]):
            best[key] = (tile, means[tile])
    return best


def cuda_milliseconds(run: Callable[[int], object], n_sets: int, repeats: int = 50) -> float:
    """Median time of `run` on the current GPU, each call between two events, input sets in turn."""
    for index in range(max(3, n_sets)):
        run(index % n_sets)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for index, (start, end) in enumerate(events):
        start.record()
        run(index % n_sets)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


class _Inputs:
    """Input sets of one setting, and what the first of them must give."""

    def __init__(self, setting: Setting, dtype: torch.dtype, device: torch.device) -> None:
        self.setting = setting
        generator = torch.Generator(device).manual_seed(0)
        first = _problem(setting, dtype, device, generator)
        bytes_of_set = 2 * first.query.untyped_storage().nbytes()
        n_sets = min(max(_SET_BYTES // bytes_of_set, _SETS[0]), _SETS[1])
        self.problems = [first] + [_problem(setting, dtype, device, generator) for _ in range(n_sets - 1)]
        self.grad_out = _draw((*first.query.shape[:3], setting.dim), dtype, device, generator)
        self.gradients = _gradients(first)
        self.needs_factor = setting.routing_weight != "none"
        drawn = [_draw((setting.dim, *rest), dtype, device, generator) for rest in ((1, 3, 3), ())]
        self.lepes = [_lepe(problem, *drawn) for problem in self.problems]
        self.saved = [self.forward(index) for index in range(n_sets)]
        self.expected = self._expected()

    def _expected(self) -> dict[str, list[Tensor]]:
        problem = _widened(self.problems[0])
        gradients = _gradients(problem)
        lepe = _lepe(problem, self.lepes[0].weight.float(), self.lepes[0].bias.float())
        out, share, lse = torch_backend.attention_forward(problem, lepe)
        assert share is not None  # there is LePE
        arguments = (self.grad_out.float(), problem, share, lse, gradients, self.needs_factor)
        small = torch_backend.attention_backward(*arguments)
        return {
            FORWARD: [out],
            QUERY_GRADIENT: _present(gradients.query, small.factor),
            KEY_VALUE_GRADIENT: [gradients.key, gradients.value],
        }

    def forward(self, index: int) -> tuple[Tensor, Tensor | None, Tensor]:
        return attention.attention_forward(self.problems[index], self.lepes[index])

    def backward(self, index: int) -> SmallGradients:
        _, share, lse = self.saved[index]
        assert share is not None
        arguments = (self.grad_out, self.problems[index], share, lse, self.gradients, self.needs_factor)
        return attention.attention_backward(*arguments)

    def error(self, kernel: str) -> float:
        """Largest relative error of what the kernel computes from the first set."""
        if kernel == FORWARD:
            found = [self.forward(0)[0]]
        else:
            for gradient in (self.gradients.query, self.gradients.key, self.gradients.value):
                gradient.fill_(math.nan)
            small, g = self.backward(0), self.gradients
            found = _present(g.query, small.factor) if kernel == QUERY_GRADIENT else [g.key, g.value]
        pairs = zip(found, self.expected[kernel], strict=True)
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]
        return max(math.inf if math.isnan(error) else error for error in errors)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _time(trial: Trial, inputs: _Inputs, timer: Timer) -> tuple[float, str]:
    """Milliseconds of a trial, or infinity and why it is refused."""
    with tiles.use_tiles({trial.kernel: trial.tile}):
        try:
            error = inputs.error(trial.kernel)
            if not error <= TOLERANCE[trial.dtype]:
                return math.inf, f"refused: relative error {error:.1e}"
            run = inputs.forward if trial.kernel == FORWARD else inputs.backward
            return timer(run, len(inputs.problems)), ""
        except Exception as failure:  # too much shared memory, or any of the compiler's errors
            return math.inf, f"refused: {type(failure).__name__}: {failure}"[:200]


def _problem(
    setting: Setting, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> RoutedAttention:
    """Random maps, a random graph and, for soft routing, random weights."""

    def draw(*shape: int) -> Tensor:
        return _draw(shape, dtype, device, generator)

    widths, grid = (setting.qk_dim, setting.qk_dim, setting.dim), setting.grid
    query, key, value = draw(setting.batch, setting.height, setting.width, sum(widths)).split(widths, dim=-1)
    likes = torch.rand(setting.batch, 1, grid.n_regions, grid.n_regions, generator=generator, device=device)
    r_idx = likes.topk(setting.topk).indices.int()
    padding = Padding(draw(widths[1]), draw(widths[2])) if grid.is_padded else None
    is_soft, scale = setting.routing_weight == "soft", setting.qk_dim**-0.5
    factor = torch.rand(r_idx.shape, generator=generator, device=device) if is_soft else None
    return RoutedAttention(query, key, value, r_idx, grid, grid, setting.num_heads, scale, factor, padding)


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _lepe(problem: RoutedAttention, weight: Tensor, bias: Tensor) -> Lepe:
    return Lepe(problem.value, weight, bias, problem.kv_grid, problem.padding and problem.padding.value)


def _gradients(problem: RoutedAttention) -> Gradients:
    maps = (problem.query, problem.key, problem.value)
    packed = torch.empty(*problem.query.shape[:3], sum(x.shape[-1] for x in maps)).to(problem.query)
    return Gradients(*packed.split([x.shape[-1] for x in maps], dim=-1))


def _widened(problem: RoutedAttention) -> RoutedAttention:
    """The same problem in float32."""
    padding = problem.padding and Padding(problem.padding.key.float(), problem.padding.value.float())
    query, key, value = (x.float() for x in (problem.query, problem.key, problem.value))
    return replace(problem, query=query, key=key, value=value, padding=padding)


def card_name(device: torch.device) -> str:
    """Name of the card, as the cache knows it; "cpu" under the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _circumstances(device: torch.device, trial: Trial) -> dict[str, str]:
    return tile_cache.circumstances(card_name(device), trial.kernel)


def _read_kept(kept: Path, todo: Sequence[Trial], device: torch.device) -> dict[Trial, float]:
    by_name = {str(trial): trial for trial in todo}
    results = {}
    for row in _rows(kept):
        trial = by_name.get(row.get("trial", ""))
        if trial and _circumstances(device, trial).items() <= row.items():
            results[trial] = float(row["milliseconds"])
    return results


def _rows(kept: Path) -> Iterator[dict]:
    for line in kept.read_text().splitlines() if kept.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was stopped
        if isinstance(row, dict):
            yield row


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
