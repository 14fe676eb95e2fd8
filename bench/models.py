"""Times models on the fused backend beside the einops reference, and YOLO26 beside the stock models.

Inference is a forward without gradients. A training step is forward, loss and backward; the optimizer is left
out, because it takes the same time on every backend. All models get the same random input. The fused model
and the reference have the same weights, and their outputs are compared before anything is timed. A ratio is
the reference's figure divided by a model's: 1.5 means 1.5 times as fast, or 1/1.5 of the memory.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bra_triton import biformer
from bra_triton.bench import measure
from bra_triton.bench.console import conclude, count, parser_of, table, write_json

FUSED, REFERENCE, STOCK = "fused", "reference", "stock"
FIGURES = INFERENCE, STEP = "inference", "training step"
YOLO_MODELS = [f"yolo26{scale}-{kind}" for kind in ("bra", "biformer") for scale in "ns"]
BIFORMER_MODELS = ["biformer_tiny", "biformer_small"]
DEFAULT = ["yolo26n-bra", "yolo26n-biformer", "biformer_tiny"]
Row = dict[str, dict[str, float]]  # by model, then by figure and unit, such as "inference ms"
# The largest error (norm of the difference over norm of the truth) of float32 outputs after tens of layers,
# and under autocast, which rounds to half precision. Wrong regions would give an error of 0.1 or more.
TOLERANCE, AUTOCAST_TOLERANCE = 1e-3, 5e-2


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

    Raises WrongResultError if the outputs of the fused model and of the reference differ.
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
    add = parser.add_argument
    add("--model", nargs="+", choices=YOLO_MODELS + BIFORMER_MODELS, default=DEFAULT, metavar="MODEL")
    add("--imgsz", type=int, help="side of the images in pixels (default: 640; 224 for BiFormer)")
    add("--batch", type=count, default=2, help="images (default: 2)")
    add("--amp", action="store_true", help="under autocast, as Ultralytics trains on a GPU")
    options = parser.parse_args(arguments)
    if options.imgsz is not None and (options.imgsz < 32 or options.imgsz % 32):
        parser.error(f"--imgsz must be a multiple of 32, got {options.imgsz}")
    return options
