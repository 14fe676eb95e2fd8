"""Whole modules on a CPU beside the einops reference: `bra-bench peers --preset cpu`.

The module, projections and 5 x 5 LePE included, on the torch backend and on the reference, with the same
weights: time of a forward without gradients and of a training step, and how much memory a step takes. Every
figure is a ratio to the reference of the same run: 2.5 means 2.5 times as fast, or 1/2.5 of the memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from statistics import geometric_mean

import torch
from torch import Tensor, nn

from bra_triton import BiLevelRoutingAttention
from bra_triton.bench import measure
from bra_triton.bench.console import table
from bra_triton.bench.problems import PROBLEMS, Problem

FUSED, REFERENCE = "torch", "reference"
FORWARD, STEP, MEMORY = "forward", "training step", "peak memory of a step"
# BiFormer-T's stages at 224 pixels, YOLO26's maps at 640, and one of 1280.
PRESET = {
    name: replace(PROBLEMS[problem], batch=batch, n_win=n_win, side_dwconv=5)
    for name, problem, batch, n_win in (
        ("stage 1", "biformer_stage1", 8, 7),
        ("stage 2", "biformer_stage2", 8, 7),
        ("stage 3", "biformer_stage3", 8, 7),
        ("P3", "yolo_p3", 2, 8),
        ("P4", "yolo_p4", 2, 8),
        ("P5", "yolo_p5", 2, 5),
        ("160 x 160", "high_resolution", 1, 8),
    )
}


# The least that a figure's geometric mean over the maps may be, and the least of any map.
TARGETS = {FORWARD: (2.5, 1.3), STEP: (3.0, 1.8), MEMORY: (3.5, 2.0)}


def report(problems: Mapping[str, Problem], repeats: int) -> int:
    """Measures and prints; returns 1 where a target is missed or the two do not compute the same."""
    print(measure.on_one_line(measure.circumstances(measure.CPU)))
    rows = {name: ratios(problem, repeats) for name, problem in problems.items()}
    cells = [
        {"map": f"{name}: {problems[name]}", **{figure: f"{ratio:.2f}" for figure, ratio in row.items()}}
        for name, row in rows.items()
    ]
    print(table("The module beside the einops reference, CPU, float32", cells))
    all_met = True
    for figure, (least_mean, least) in TARGETS.items():
        found = [row[figure] for row in rows.values()]
        met = geometric_mean(found) >= least_mean and min(found) >= least
        all_met &= met
        print(
            f"{figure}: geometric mean {geometric_mean(found):.2f}, least {min(found):.2f}; "
            f"target {least_mean} and {least}: {'met' if met else 'MISSED'}"
        )
    return int(not all_met)


def ratios(problem: Problem, repeats: int) -> dict[str, float]:
    """What the reference takes over what the fused module takes, by figure.

    Raises:
        WrongResultError: the two compute something else.
    """
    modules, x = _pair(problem)
    _check(modules, x)

    def ratio(phase: str, what: str) -> float:
        return figures[phase][REFERENCE][what] / figures[phase][FUSED][what]

    figures = {}
    for phase in ("no grad", "step"):
        runs = {name: measure.call_of(module, x, phase) for name, module in modules.items()}
        figures[phase] = measure.side_by_side(runs, measure.CPU, repeats)
    return {
        FORWARD: ratio("no grad", "seconds"),
        STEP: ratio("step", "seconds"),
        MEMORY: ratio("step", "peak_bytes"),
    }


def _pair(problem: Problem) -> tuple[dict[str, nn.Module], Tensor]:
    """The module on both backends, with the same weights, and a map."""
    modules: dict[str, nn.Module] = {}
    for name in (FUSED, REFERENCE):
        torch.manual_seed(0)
        modules[name] = BiLevelRoutingAttention(**problem.module_arguments, backend=name)
    return modules, torch.randn(problem.batch, problem.height, problem.width, problem.dim)


def _check(modules: Mapping[str, nn.Module], x: Tensor) -> None:
    found = {}
    for name, module in modules.items():
        x = x.detach().requires_grad_()
        out = module(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        found[name] = {"the output": out.detach(), "the gradient": gradient}
    measure.check(found[FUSED], found[REFERENCE], measure.TOLERANCE[x.dtype])
