"""Counts what the attention costs in YOLO26, without measuring: the tables of docs/yolo_guide.md.

The first table is for the attention alone, on maps of the backbone: multiply-adds of routing and attention,
beside those of dense attention. The second has parameters and GFLOPs of the packaged and the stock models.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from bra_triton import BiLevelRoutingAttention
from bra_triton.bench.console import parser_of
from bra_triton.kernels.grid import RegionGrid

STRIDES = {"P3": 8, "P4": 16, "P5": 32}
CHANNELS = {"P3": 128, "P4": 128, "P5": 256}  # of the backbone of yolo26n, rows 4, 6 and 8
CHOICES = ((4, 4), (5, 4), (7, 4), (8, 4), (8, 16), (16, 8))
SUFFIXES = ("", "-seg", "-pose", "-obb", "-depth", "-sem", "-cls")
CLASSIFIER_SIZE = 224


def attention_rows(imgsz: int) -> Iterator[str]:
    """The first table: a row for every level and choice whose regions have 2 tokens or more along a side."""
    from bra_triton.yolo_integration.flops import count_attention

    yield "| level | map | n_win, topk | region | keys of a query | padding | MMACs | dense |"
    yield "|---|---|---|---|--:|--:|--:|--:|"
    for (level, stride), (n_win, topk) in itertools.product(STRIDES.items(), CHOICES):
        side, dim = imgsz // stride, CHANNELS[level]
        if side < 2 * n_win:
            continue
        grid = RegionGrid.of_windows(side, side, n_win)
        module = BiLevelRoutingAttention(dim, dim // 32, n_win, topk=topk, side_dwconv=0, auto_pad=True)
        x = torch.empty(1, side, side, dim, device="meta")
        module.total_ops = 0
        count_attention(module, (x,), x)
        yield (
            f"| {level} | {side} x {side} x {dim} | {n_win}, {topk} "
            f"| {grid.region_height} x {grid.region_width} | {topk * grid.region_tokens} of {side**2} "
            f"| {grid.share_of_padding:.0%} | {module.total_ops / 1e6:,.1f} "
            f"| {side**4 * 2 * dim / 1e6:,.1f} |"
        )


def model_rows(names: Sequence[str], imgsz: int) -> Iterator[str]:
    """The second table: a row for every yaml file, which Ultralytics finds by its name."""
    from ultralytics import YOLO
    from ultralytics.utils.torch_utils import get_flops, get_num_params

    import bra_triton.yolo_integration  # noqa: F401, registers the yamls

    yield "| model | pixels | parameters | GFLOPs |"
    yield "|---|--:|--:|--:|"
    for name in names:
        size = CLASSIFIER_SIZE if name.endswith("-cls.yaml") else imgsz
        model = YOLO(name, verbose=False).model
        yield f"| `{name}` | {size} | {get_num_params(model):,} | {get_flops(model, size):.1f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both tables."""
    parser = parser_of("yolo-costs", __doc__, has_json=False)
    parser.add_argument("--imgsz", type=int, default=640, help="side of the images in pixels (default: 640)")
    parser.add_argument("--scale", default="n", choices="nsmlx", help="scale of the models (default: n)")
    options = parser.parse_args(arguments)
    if options.imgsz < 64 or options.imgsz % 32:
        parser.error(f"--imgsz must be a multiple of 32 of at least 64, got {options.imgsz}")
    pairs = [f"yolo26{options.scale}{kind}{s}.yaml" for s in SUFFIXES for kind in ("", "-bra")]
    names = [*pairs[:2], f"yolo26{options.scale}-biformer.yaml", *pairs[2:]]
    print(*attention_rows(options.imgsz), "", *model_rows(names, options.imgsz), sep="\n")
    return 0
