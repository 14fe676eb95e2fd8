"""The blocks in a YOLO model under `torch.compile`, as `compile=True` of Ultralytics compiles it."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from ultralytics.nn.tasks import DetectionModel

import bra_triton.yolo_integration  # noqa: F401

BLOCKS = (
    (1, "BiLevelRoutingAttention", [{"topk": 2}]),
    (1, "nchwBRA", [{"topk": 2}]),
    (1, "BiFormerBlock", [{"topk": 2, "n_win": 4}]),
    (1, "C2BRA", [32, {"topk": 2, "n_win": 2}]),
    (1, "C3k2BRA", [32, {"topk": 2, "n_win": (2, 3)}]),
)
# At stride 4 maps are 10 x 10, 9 x 8 and 12 x 20. For `n_win` 5, 4 and 2 one of the maps is a multiple and
# another is not, so that these blocks pad some maps only; with 2 x 3 every map is padded. The first graph is
# for the first size only; one more graph must serve all other sizes.
SIZES = ((40, 40), (36, 32), (48, 80), (40, 40))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_of_every_block_is_one_graph_and_is_compiled_once_more_for_all_other_sizes(mode: str) -> None:
    """`fullgraph` forbids graph breaks. The stock head breaks the graph in eval, so it is left out there."""
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], *([-1, *block] for block in BLOCKS)]
    head = [[[len(rows) - 1], 1, "Detect", [2]]]
    yolo = DetectionModel({"nc": 2, "backbone": rows, "head": head}, verbose=False)
    model = yolo.train() if mode == "train" else nn.Sequential(*yolo.model[:-1]).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        with torch.set_grad_enabled(mode == "train"):
            found, expected = compiled(x), model(x)
        torch.testing.assert_close(found, expected)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]
