"""Data sets of noise for every task of Ultralytics, so small that a training takes a second."""

from pathlib import Path

import numpy as np
import yaml as pyyaml
from PIL import Image

QUADRILATERAL = "0 0.3 0.3 0.7 0.3 0.7 0.7 0.3 0.7"
LABELS = {
    "detect": "0 0.5 0.5 0.4 0.4",
    "segment": QUADRILATERAL,
    "obb": QUADRILATERAL,
    "pose": "0 0.5 0.5 0.4 0.4" + " 0.5 0.5 2" * 17,
}


def write_data(root: Path, task: str, images: int) -> str:
    """Writes a data set for a task: images of noise, 64 pixels high and 48 or 64 wide, with one object each.

    Returns the argument `data` of a training: the path of the yaml or, for `classify`, of the folder.
    """
    rng = np.random.default_rng(0)
    for index in range(images):
        size = (64, 48 + 16 * (index % 2))
        # A classifier's images lie in the folders of their classes.
        folder = f"{('train', 'val')[index % 2]}/thing" if task == "classify" else "images"
        arrays = {f"{folder}/{index}.png": rng.integers(0, 255, (*size, 3), dtype=np.uint8)}
        if task == "semantic":
            arrays[f"masks/{index}.png"] = rng.integers(0, 2, size, dtype=np.uint8)
        if task == "depth":  # in millimetres
            arrays[f"depth/{index}.png"] = rng.integers(1000, 9000, size, dtype=np.uint16)
        for name, pixels in arrays.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name)
        if task in LABELS:
            (root / "labels").mkdir(exist_ok=True)
            (root / "labels" / f"{index}.txt").write_text(f"{LABELS[task]}\n")
    if task == "classify":
        return str(root)
    yaml = {"path": str(root), "train": "images", "val": "images", "names": ["thing", "other"]}
    extra = {"semantic": {"masks_dir": "masks"}, "pose": {"kpt_shape": [17, 3]}}.get(task, {})
    (root / "data.yaml").write_text(pyyaml.safe_dump(yaml | extra))
    return str(root / "data.yaml")
