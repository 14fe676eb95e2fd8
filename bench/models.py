"""Times whole models on the fused backend beside the einops reference, and YOLO26 beside the stock models.

Inference is a forward without gradients. A training step is forward, loss and backward; the optimizer, which
takes the same on every backend, is left out. All have the same random input, the fused model and the
reference also the same weights, and their outputs are compared before anything is timed. Every ratio is to
the reference of the same run: 1.5 means 1.5 times as fast, or 1/1.5 of the memory.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bra_triton import biformer
from bra_triton.bench import measure
from bra_triton.bench.tables import table

FUSED, REFERENCE, STOCK = "fused", "reference", "stock"
INFERENCE, STEP = "inference", "training step"
YOLO_MODELS = [f"yolo26{scale}-{kind}" for kind in ("bra", "biformer") for scale in "ns"]
BIFORMER_MODELS = ["biformer_tiny", "biformer_small"]
DEFAULT = ["yolo26n-bra", "yolo26n-biformer", "biformer_tiny"]
LEAST_RATIO = 1.0
# Norm of the difference over the norm, of float32 outputs behind tens of layers; autocast rounds to half
# precision. Other regions would give 0.1 and more.
TOLERANCE, AUTOCAST_TOLERANCE = 1e-3, 5e-2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 where the fused backend is slower or larger than the reference."""
    options = _parse(arguments)
    device = measure.default_device()
    described = measure.circumstances(device)
    print(measure.on_one_line(described), flush=True)
    rows = {name: measure_model(name, options, device) for name in options.model}
    print(report(rows, options))
    if options.json:
        options.json.write_text(json.dumps({"versions": described, "rows": rows}, indent=2) + "\n")
    failures = missed(rows)
    for failure in failures:
        print(f"MISSED: {failure}")
    print(f"target, fused beside reference: at least {LEAST_RATIO}: {'MISSED' if failures else 'met'}")
    return int(bool(failures))


def measure_model(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds and peak bytes of each figure, by what is measured; the models take turns.

    Raises:
        WrongResultError: the fused model and the reference compute something else.
    """
    from bra_triton.yolo_integration import set_backend

    torch.manual_seed(0)
    side = options.imgsz or (640 if name in YOLO_MODELS else 224)
    images = torch.rand(options.batch, 3, side, side, device=device)
    models = {key: model.to(device) for key, model in _models(name).items()}
    for key, backend in ((FUSED, "triton" if device.type == "cuda" else "torch"), (REFERENCE, "reference")):
        set_backend(models[key], backend)
    with torch.autocast(device.type, enabled=options.amp):
        fused, reference = (_outputs(models[key], images) for key in (FUSED, REFERENCE))
        measure.check(fused, reference, AUTOCAST_TOLERANCE if options.amp else TOLERANCE)
        found: dict[str, dict[str, Any]] = {key: {} for key in models}
        for figure in (INFERENCE, STEP):
            runs = {key: _run(model, images, figure) for key, model in models.items()}
            seconds = measure.interleaved_minima(runs, device, options.repeats, waits=True)
            for key, run in runs.items():
                peak = measure.peak_bytes(run, device)
                found[key][figure] = {"seconds": seconds[key], "peak_bytes": peak}
    return found


def _models(name: str) -> dict[str, nn.Module]:
    """The model twice, with the same weights; and the stock one."""
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
    labels = _labels(len(images), images.device)

    def step() -> None:
        if hasattr(model, "loss"):  # Ultralytics'
            loss, _ = model.loss({"img": images, **labels})
        else:
            loss = F.cross_entropy(model(images), labels["cls"][:, 0].long())
        loss.sum().backward()
        model.zero_grad()

    return step


def _labels(batch: int, device: torch.device) -> dict[str, Tensor]:
    """One object an image, in the middle; its class serves a classifier, too."""
    return {
        "cls": torch.zeros(batch, 1, device=device),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]], device=device).expand(batch, 4),
        "batch_idx": torch.arange(batch, device=device),
    }


def _outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        leaves = tree_leaves(model.train()(images))
    return {
        "the fused model's output": torch.cat([x.flatten().float() for x in leaves if isinstance(x, Tensor)])
    }


def missed(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the fused model is slower or larger than the reference, in words."""
    return [
        f"{name}, {figure}: {key} {ratio:.2f} times as good"
        for name, row in rows.items()
        for figure in (INFERENCE, STEP)
        for key in ("seconds", "peak_bytes")
        if not (ratio := row[REFERENCE][figure][key] / row[FUSED][figure][key]) >= LEAST_RATIO
    ]


def report(rows: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """The rows as text, each figure with its ratio to the reference's."""
    cells = []
    for name, row in rows.items():
        for key, figures in row.items():
            line = {"model": name, "on": key}
            for figure in (INFERENCE, STEP):
                mine, other = figures[figure], row[REFERENCE][figure]
                for what, unit, factor in (("seconds", "ms", 1e3), ("peak_bytes", "MiB", 2**-20)):
                    ratio = other[what] / mine[what]
                    line[f"{figure} {unit}"] = f"{mine[what] * factor:.1f} ({ratio:.2f}x)"
            cells.append(line)
    precision = "autocast" if options.amp else "float32"
    return table(f"Whole models, batch {options.batch}, {precision}", cells)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bra-bench models", description=__doc__.split("\n\n")[0])
    choices = YOLO_MODELS + BIFORMER_MODELS
    parser.add_argument("--model", nargs="+", choices=choices, default=DEFAULT, metavar="MODEL")
    parser.add_argument("--imgsz", type=int, help="pixels a side (default: 640; 224 for BiFormer)")
    parser.add_argument("--batch", type=int, default=2, help="images (default: 2)")
    parser.add_argument("--amp", action="store_true", help="under autocast, as Ultralytics trains on a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="calls, of which the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args(arguments)
    if options.imgsz is not None and (options.imgsz < 32 or options.imgsz % 32):
        parser.error(f"--imgsz must be a multiple of 32, got {options.imgsz}")
    if options.batch < 1 or options.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    return options
