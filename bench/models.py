"""Times models on the fused backend beside the einops reference, and YOLO26 beside the stock models.

Inference is a forward without gradients. A training step is forward, loss and backward; the optimizer is left
out, because it takes the same time on every backend. All models get the same random input. The fused model
and the reference have the same weights, and their outputs are compared before anything is timed. A ratio is
the reference's figure divided by a model's, from the same run: 1.5 means 1.5 times as fast, or 1/1.5 of the
memory.

`bra-bench peers --preset cpu` does the same with the module alone, including its projections and 5 x 5 LePE,
on the torch backend; there the loss of a step is the sum of the output.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from multiprocessing import get_context
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bra_triton import BiLevelRoutingAttention, biformer
from bra_triton.bench import measure
from bra_triton.bench.console import conclude, count, parser_of, table, write_json
from bra_triton.bench.problems import PROBLEMS, Problem

FUSED, REFERENCE, STOCK = "fused", "reference", "stock"
FIGURES = INFERENCE, STEP = "inference", "training step"
YOLO_MODELS = [f"yolo26{scale}-{kind}" for kind in ("bra", "biformer") for scale in "ns"]
BIFORMER_MODELS = ["biformer_tiny", "biformer_small"]
DEFAULT = ["yolo26n-bra", "yolo26n-biformer", "biformer_tiny"]
Row = dict[str, dict[str, float]]  # by model, then by figure and unit, such as "inference ms"
# The largest error (norm of the difference over norm of the truth) of float32 outputs after tens of layers,
# and under autocast, which rounds to half precision. Wrong regions would give an error of 0.1 or more.
TOLERANCE, AUTOCAST_TOLERANCE = 1e-3, 5e-2
# For the module alone: BiFormer-T's stages at 224 pixels, YOLO26's maps at 640, and one map at 1280.
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
# By title: the figure, the least geometric mean of its ratio over all maps, and the least ratio of any map.
TARGETS = {
    "forward": (f"{INFERENCE} ms", 2.5, 1.3),
    "training step": (f"{STEP} ms", 3.0, 1.8),
    "peak memory of a step": (f"{STEP} MiB", 3.5, 2.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if the fused backend takes more time or memory than the reference."""
    options = _parse(arguments)
    device = measure.default_device()
    described = measure.circumstances(device)
    print(measure.on_one_line(described), flush=True)
    rows = {name: measure_model(name, options, device) for name in options.model}
    precision = "autocast" if options.amp else "float32"
    print(report(f"Whole models, batch {options.batch}, {precision}", "model", rows))
    write_json(options.json, {"versions": described, "rows": rows})
    return conclude(missed(rows))


def measure_model(name: str, options: argparse.Namespace, device: torch.device) -> Row:
    """Time and peak memory of inference and of a training step, by model; the models take turns."""
    from bra_triton.yolo_integration import set_backend

    torch.manual_seed(0)
    side = options.imgsz or (640 if name in YOLO_MODELS else 224)
    images = torch.rand(options.batch, 3, side, side, device=device)
    models = {key: model.to(device) for key, model in _models(name).items()}
    for key, backend in ((FUSED, "triton" if device.type == "cuda" else "torch"), (REFERENCE, "reference")):
        set_backend(models[key], backend)
    tolerance = AUTOCAST_TOLERANCE if options.amp else TOLERANCE
    with torch.autocast(device.type, enabled=options.amp):
        return compare(models, images, _run, tolerance, options.repeats)


def compare(
    models: Mapping[str, nn.Module],
    x: Tensor,
    run_of: Callable[[nn.Module, Tensor, str], measure.Run],
    tolerance: float,
    repeats: int,
) -> Row:
    """The figures of every model; the models take turns. `run_of` makes the call that is timed for a figure.

    Raises:
        WrongResultError: the outputs of the fused model and of the reference differ.
    """
    fused, reference = (_outputs(models[key], x) for key in (FUSED, REFERENCE))
    measure.check(fused, reference, tolerance)
    row: Row = {key: {} for key in models}
    for figure in FIGURES:
        runs = {key: run_of(model, x, figure) for key, model in models.items()}
        seconds = measure.interleaved_minima(runs, x.device, repeats, waits=True)
        for key, run in runs.items():
            peak = measure.peak_bytes(run, x.device)
            row[key] |= {f"{figure} ms": 1e3 * seconds[key], f"{figure} MiB": peak / 2**20}
    return row


def ratios(row: Row, name: str = FUSED) -> dict[str, float]:
    """The reference's figures divided by those of a model, by figure and unit."""
    return {figure: row[REFERENCE][figure] / mine for figure, mine in row[name].items()}


def _models(name: str) -> dict[str, nn.Module]:
    """The model twice, with the same weights, and for YOLO26 also the stock model."""
    if name in BIFORMER_MODELS:
        models: dict[str, nn.Module] = {FUSED: getattr(biformer, name)(auto_pad=True, drop_path_rate=0.0)}
    else:
        models = {FUSED: _yolo(name), STOCK: _yolo(name.partition("-")[0])}
    return {**models, REFERENCE: deepcopy(models[FUSED])}


def _yolo(name: str) -> nn.Module:
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg

    model: Any = YOLO(f"{name}.yaml", verbose=False).model
    model.args = get_cfg()  # the loss reads its gains there
    return model


def _run(model: Any, images: Tensor, figure: str) -> measure.Run:
    model.train(figure == STEP)
    if figure == INFERENCE:
        return torch.no_grad()(lambda: model(images))
    # One object per image, in the middle; a classifier gets its class as the label.
    batch, device = len(images), images.device
    labels = {
        "cls": torch.zeros(batch, 1, device=device),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]], device=device).expand(batch, 4),
        "batch_idx": torch.arange(batch, device=device),
    }

    def step() -> None:
        if hasattr(model, "loss"):  # a model of Ultralytics
            loss, _ = model.loss({"img": images, **labels})
        else:
            loss = F.cross_entropy(model(images), labels["cls"][:, 0].long())
        loss.sum().backward()
        model.zero_grad()

    return step


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(model.train()(images))
    found = torch.cat([x.flatten().float() for x in leaves if isinstance(x, Tensor)])
    return {"the output on the fused backend": found}


def missed(rows: Mapping[str, Row]) -> list[str]:
    """The figures in which the fused model is worse than the reference, in words."""
    return [
        f"{name}: {figure}: reference / fused is {ratio:.2f}, must be at least 1"
        for name, row in rows.items()
        for figure, ratio in ratios(row).items()
        if not ratio >= 1
    ]


def report(title: str, kind: str, rows: Mapping[str, Row]) -> str:
    """The rows as a table, each figure with its ratio; `kind` is the title of the column with their names."""
    cells = [
        {kind: name, "on": key}
        | {figure: f"{row[key][figure]:.1f} ({ratio:.2f}x)" for figure, ratio in ratios(row, key).items()}
        for name, row in rows.items()
        for key in row
    ]
    return table(title, cells)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("models", __doc__, repeats=15)
    choices = YOLO_MODELS + BIFORMER_MODELS
    parser.add_argument("--model", nargs="+", choices=choices, default=DEFAULT, metavar="MODEL")
    parser.add_argument(
        "--imgsz", type=int, help="side of the images in pixels (default: 640; 224 for BiFormer)"
    )
    parser.add_argument("--batch", type=count, default=2, help="images (default: 2)")
    parser.add_argument("--amp", action="store_true", help="under autocast, as Ultralytics trains on a GPU")
    options = parser.parse_args(arguments)
    if options.imgsz is not None and (options.imgsz < 32 or options.imgsz % 32):
        parser.error(f"--imgsz must be a multiple of 32, got {options.imgsz}")
    return options


def report_modules(problems: Mapping[str, Problem], repeats: int) -> int:
    """Measures the module on the problems and prints; returns 1 if a target is missed."""
    print(measure.on_one_line(measure.circumstances(measure.CPU)))
    rows = {f"{name}: {problem}": measure_module(problem, repeats) for name, problem in problems.items()}
    print(report("The module beside the einops reference, CPU, float32", "map", rows))
    all_met = True
    for title, (key, least_mean, least) in TARGETS.items():
        column = [ratios(row)[key] for row in rows.values()]
        met = geometric_mean(column) >= least_mean and min(column) >= least
        all_met &= met
        print(
            f"{title}: geometric mean {geometric_mean(column):.2f}, least {min(column):.2f}; "
            f"target {least_mean} and {least}: {'met' if met else 'MISSED'}"
        )
    return int(not all_met)


def measure_module(problem: Problem, repeats: int) -> Row:
    """The figures of the module on both backends; a step's memory is what it adds to a fresh process.

    Raises:
        WrongResultError: the gradients or the outputs of the two backends differ.
    """
    modules, x = module_pair(problem)
    fused, reference = ({"the gradient on the fused backend": _gradient(m, x)} for m in modules.values())
    measure.check(fused, reference, measure.TOLERANCE[x.dtype])
    row = compare(modules, x, _module_run, measure.TOLERANCE[x.dtype], repeats)
    for name in modules:
        row[name][f"{STEP} MiB"] = _in_fresh_process(_step_bytes, problem, name) / 2**20
    return row


def module_pair(problem: Problem) -> tuple[dict[str, nn.Module], Tensor]:
    """The module on both backends, with the same weights, and a random map."""
    modules: dict[str, nn.Module] = {}
    for name, backend in ((FUSED, "torch"), (REFERENCE, "reference")):
        torch.manual_seed(0)
        modules[name] = BiLevelRoutingAttention(**problem.module_arguments, backend=backend)
    return modules, torch.randn(problem.batch, problem.height, problem.width, problem.dim)


def _module_run(module: nn.Module, x: Tensor, figure: str) -> measure.Run:
    return measure.call_of(module, x, "step" if figure == STEP else "no grad")


def _gradient(module: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), x)[0]


def _in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _step_bytes(problem: Problem, name: str) -> int:
    """Bytes by which a training step raises the peak of resident memory of a fresh process."""
    modules, x = module_pair(problem)
    run = _module_run(modules[name], x, STEP)
    before = measure.process_peak_bytes()
    run()
    return measure.process_peak_bytes() - before
