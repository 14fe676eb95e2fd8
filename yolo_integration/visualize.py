"""The `bra-visualize` command: what the attention of a YOLO model looks at in an image.

bra-visualize street.jpg --weights best.pt --point 320,200
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ultralytics import YOLO

from bra_triton.visualize import attention_figure, attention_page

DOTS_PER_INCH = 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0. If an argument is wrong, it exits with status 2 and a message."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, file in (("IMAGE", options.image), ("--weights", options.weights)):
        if not file.is_file() and file.suffix != ".yaml":
            parser.error(f"{name} must be a file, got {file}")
    settings = {name: getattr(options, name) for name in ("imgsz", "device")}
    given = {name: value for name, value in settings.items() if value is not None}
    out = options.out or Path(f"{options.image.stem}-attention.{'html' if options.html else 'png'}")
    if not out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists, got {out}")
    if options.html and out.suffix not in (".html", ".htm"):
        parser.error(f"--out must end in .html for a page (--html), got {out}")
    look = {"point": options.point, "layers": options.layer, "verbose": False, **given}
    model = YOLO(options.weights)
    try:
        if options.html:
            out.write_text(attention_page(model, str(options.image), **look), "utf-8")
        else:
            attention_figure(model, str(options.image), **look).savefig(out, dpi=DOTS_PER_INCH)
    except ValueError as error:
        parser.error(str(error))
    print(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("bra-visualize", description=__doc__.split("\n\n")[0])
    parser.add_argument("image", metavar="IMAGE", type=Path, help="a picture")
    parser.add_argument(
        "--weights", type=Path, required=True, help="a model: best.pt, or a yaml, for an untrained model"
    )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="L",
        help="an attention layer: its position from 0, its name, or the beginning of names, such as "
        "model.10; may be given several times; all by default",
    )
    parser.add_argument(
        "--point",
        type=_point,
        metavar="X,Y",
        help="query point in the picture's pixels; by default the centre of the prediction with the "
        "highest confidence",
    )
    parser.add_argument("--html", action="store_true", help="a page in which the pointer is the query point")
    parser.add_argument("--out", type=Path, help="file to write; IMAGE-attention.png or .html by default")
    parser.add_argument(
        "--imgsz", type=int, help="side to which the picture is letterboxed; the model's by default"
    )
    parser.add_argument("--device", help="as in Ultralytics: cpu, 0, ...")
    return parser


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be x,y, two numbers, got {text!r}") from None
    return x, y


if __name__ == "__main__":
    sys.exit(main())
