"""Times the module alone on the torch backend, beside the einops reference: `bra-bench peers --preset cpu`.

The module includes its projections and 5 x 5 LePE. What is measured, compared and printed is the same as for
whole models (`models.py`), but the loss of a training step is the sum of the output.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from bra_triton import BiLevelRoutingAttention
from bra_triton.bench import measure
from bra_triton.bench.models import FUSED, INFERENCE, REFERENCE, STEP, Row, compare, ratios, report
from bra_triton.bench.problems import PROBLEMS, Problem

# BiFormer-T's stages at 224 pixels, YOLO26's maps at 640, and one map at 1280.
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
# By title: the figure, and in float32 the least geometric mean of its ratios and the least ratio of any map.
TARGETS = {
    "forward": (f"{INFERENCE} ms", 2.5, 1.3),
    "training step": (f"{STEP} ms", 3.0, 1.8),
    "peak memory of a step": (f"{STEP} MiB", 3.5, 2.0),
}


def measure_preset(repeats: int, dtype: str) -> int:
    """Measures the module on the preset's maps and prints; returns 1 if a target is missed."""
    print(measure.on_one_line(measure.circumstances(measure.CPU)))
    rows = {
        f"{name}: {problem}": measure_module(problem, repeats, measure.DTYPES[dtype])
        for name, problem in PRESET.items()
    }
    print(report(f"The module beside the einops reference, CPU, {dtype}", "map", rows))
    all_met = True
    for title, (key, least_mean, least) in TARGETS.items():
        column = [ratios(row)[key] for row in rows.values()]
        found = f"{title}: geometric mean {geometric_mean(column):.2f}, least {min(column):.2f}"
        if dtype == "float32":
            met = geometric_mean(column) >= least_mean and min(column) >= least
            all_met &= met
            found += f"; target {least_mean} and {least}: {'met' if met else 'MISSED'}"
        print(found)
    return int(not all_met)


def measure_module(problem: Problem, repeats: int, dtype: torch.dtype) -> Row:
    """The figures of the module on both backends; a step's memory is what it adds to a fresh process.

    Raises WrongResultError if the gradients or the outputs of the two backends differ.
    """
    modules, x = module_pair(problem, dtype)
    fused, reference = ({"the gradient on the fused backend": _gradient(m, x)} for m in modules.values())
    measure.check(fused, reference, measure.TOLERANCE[x.dtype])
    row = compare(modules, x, _module_run, measure.TOLERANCE[x.dtype], repeats)
    for name in modules:
        row[name][f"{STEP} MiB"] = _in_fresh_process(_step_bytes, problem, dtype, name) / 2**20
    return row


def module_pair(problem: Problem, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Tensor]:
    """The module on both backends, with the same weights, and a random map."""
    modules: dict[str, nn.Module] = {}
    for name, backend in ((FUSED, "torch"), (REFERENCE, "reference")):
        torch.manual_seed(0)
        modules[name] = BiLevelRoutingAttention(**problem.module_arguments, backend=backend).to(dtype)
    return modules, torch.randn(problem.batch, problem.height, problem.width, problem.dim).to(dtype)


def _module_run(module: nn.Module, x: Tensor, figure: str) -> measure.Run:
    return measure.call_of(module, x, "step" if figure == STEP else "no grad")


def _gradient(module: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), x)[0]


def _in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _step_bytes(problem: Problem, dtype: torch.dtype, name: str) -> int:
    """Bytes by which a training step raises the peak of resident memory of a fresh process.

    A step on a map of one token per region comes first. It loads the libraries' code, some 20 MiB, which
    would otherwise count; on the smaller maps that is more than the step itself needs.
    """
    _step_of(replace(problem, batch=1, height=problem.n_win, width=problem.n_win), dtype, name)()
    run = _step_of(problem, dtype, name)
    before = measure.process_peak_bytes()
    run()
    return measure.process_peak_bytes() - before


def _step_of(problem: Problem, dtype: torch.dtype, name: str) -> measure.Run:
    modules, x = module_pair(problem, dtype)
    return _module_run(modules[name], x, STEP)
