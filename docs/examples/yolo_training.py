"""Trains YOLO26 with bi-level routing attention on the packaged photographs, and predicts with the result.

Nothing is downloaded: installed packages have the photographs (`pip install -e '.[demo]'`). On two
cores an epoch takes a few seconds; `bra-bench demo` trains until the objects are found.

    python docs/examples/yolo_training.py --epochs 20
"""

import argparse
from pathlib import Path

from ultralytics import YOLO

import bra_triton.yolo_integration  # noqa: F401, registers blocks and yamls in Ultralytics
from bra_triton.yolo_integration.photo_dataset import write_photo_dataset


def main() -> None:
    """Trains, validates, predicts and exports; prints where the results are."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--imgsz", type=int, default=320)
    options = parser.parse_args()

    data = write_photo_dataset(options.out / "photos")
    model = YOLO("yolo26n-bra.yaml")
    model.train(
        data=str(data),
        epochs=options.epochs,
        imgsz=options.imgsz,
        batch=8,
        workers=0,
        optimizer="AdamW",
        lr0=1e-3,
        amp=False,  # Ultralytics' check of mixed precision downloads a model
        plots=False,
        project=str(options.out.resolve()),
        name="train",
        exist_ok=True,
    )
    best = Path(model.trainer.best)
    # A checkpoint registers the blocks by itself: to load it, nothing of this package need be imported.
    results = YOLO(best).predict(data.parent / "images", imgsz=options.imgsz, verbose=False)
    print(f"{sum(len(result.boxes) for result in results)} objects found in {len(results)} photographs")
    print(f"weights: {best}")
    print(f"exported: {YOLO(best).export(format='torchscript', imgsz=options.imgsz)}")


if __name__ == "__main__":
    main()
