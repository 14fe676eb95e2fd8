"""Runs `bra-yolo demo`, which learns eight photographs, and compares training with the reference.

After the demo the same model is trained from the same seed for a few steps, once on the fused backend and
twice on the einops reference (see `CONTROL`). The losses are printed side by side; `summary.json` keeps them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import nn
from ultralytics import YOLO

from bra_triton.bench import measure
from bra_triton.bench.console import count, table, write_json
from bra_triton.yolo_integration import demo, set_backend
from bra_triton.yolo_integration.demo import MODEL
from bra_triton.yolo_integration.photo_dataset import write_photo_dataset

BACKENDS = ("auto", "reference")
# Plain SGD at a low learning rate, because its steps amplify rounding the least. With MuSGD's orthogonalised
# updates a difference of 2e-7 grew to 2e-3 in three steps; with high learning rates boxes are assigned anew.
COMPARISON = {"optimizer": "SGD", "lr0": 1e-3, "warmup_epochs": 0}
# The backends agree if their losses differ by at most CONTROL_FACTOR times the distance between the reference
# and a control: the reference with every weight moved by half a unit in the last place. Training amplifies
# this change as it amplifies the backends' rounding; the factor allows for several units in the last place.
CONTROL_FACTOR = 10
CONTROL = "control"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and the comparison; returns 0 if the model learned and the backends agree."""
    parser = demo.parser("bra-bench demo", __doc__)
    parser.add_argument("--compare-steps", type=count, default=5, help="steps on each backend")
    options = parser.parse_args(arguments)
    print(
        f"{demo.INTRODUCTION}Then the fused backend is compared with the reference. Both take some six "
        f"minutes of CPU time. Everything goes to {options.out}.\n"
    )
    data = write_photo_dataset(options.out / "photos")
    versions = {**measure.circumstances(measure.default_device()), "ultralytics": ultralytics.__version__}
    summary: dict[str, Any] = {"versions": versions, "model": MODEL, "imgsz": options.imgsz}
    summary["training"] = demo.learn(options)
    summary["losses"] = losses = {name: compare_steps(data, name, options) for name in (*BACKENDS, CONTROL)}
    summary["loss_distance"] = {  # one relative difference per step
        name: [abs(a / b - 1) for a, b in zip(losses[name], losses["reference"], strict=True)]
        for name in ("auto", CONTROL)
    }
    write_json(options.out / "summary.json", summary)
    report(summary, options.out)
    return demo.conclude(find_failures(summary, options.required_map50))


def find_failures(summary: dict[str, Any], required_map50: float) -> list[str]:
    """Reasons for a failure: the model learned too little, or the backends differ by more than rounding.

    The limit of a step comes from the control's largest distance up to this step. With the largest of all
    steps, the amplified rounding of the last one would hide a wrong gradient in the first. NaN is a failure.
    """
    failures = demo.find_failures(summary["training"], required_map50)
    fused, control = summary["loss_distance"]["auto"], summary["loss_distance"][CONTROL]
    for step, distance in enumerate(fused):
        # At least eps: even if the control agrees to the last bit, another order of addition may not.
        allowed = CONTROL_FACTOR * max(*control[: step + 1], torch.finfo(torch.float32).eps)
        if not distance <= allowed:
            limit = f"{CONTROL_FACTOR} times the control's, {allowed:.1e}"
            failures.append(
                f"in step {step} the backends' losses differ by {distance:.1e}, more than {limit}"
            )
    return failures


def compare_steps(data: Path, backend: str, options: argparse.Namespace) -> list[float]:
    """Trains from the seed for a few steps on a backend, or as `CONTROL`; returns the loss of each step."""
    losses = []

    def prepare(trainer: Any) -> None:
        set_backend(trainer.model, "reference" if backend == CONTROL else backend)
        if backend == CONTROL:
            _move_weights_by_rounding(trainer.model)

    model = YOLO(MODEL)
    model.add_callback("on_pretrain_routine_end", prepare)
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(float(trainer.loss.detach())))
    settings = {**demo.settings(options, f"compare-{backend}"), **COMPARISON}
    demo.fit(model, data, options.compare_steps, settings)
    return losses


def _move_weights_by_rounding(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    half_unit = torch.finfo(torch.float32).eps / 2
    with torch.no_grad():
        for weight in model.parameters():
            sign = torch.randn(weight.shape, generator=generator).sign().to(weight.device)
            weight.mul_(1 + half_unit * sign)


def report(summary: dict[str, Any], out: Path) -> None:
    """Prints the figures of `summary.json` as tables."""
    losses, distances = summary["losses"], summary["loss_distance"]
    demo.report(summary["training"], out)
    print(f"\n{measure.on_one_line(summary['versions'])}\n{MODEL}, {summary['imgsz']} px\n")
    rows = [
        {"step": step}
        | {name: f"{each[step]:.6f}" for name, each in losses.items()}
        | {f"distance of {name}": f"{each[step]:.1e}" for name, each in distances.items()}
        for step in range(len(losses["reference"]))
    ]
    print(table("Training from the same seed: loss of each step, and distance from the reference", rows))
    print("control: the reference with its weights moved by half a unit in the last place")
    print(f"\nAll figures: {out / 'summary.json'}")
