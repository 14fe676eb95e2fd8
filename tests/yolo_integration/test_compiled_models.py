"""The blocks in a YOLO model under `torch.compile`, as `compile=True` of Ultralytics compiles it."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from ultralytics.nn.tasks import DetectionModel

import bra_triton.yolo_integration  # noqa: F401
from bra_triton.modules.base import Attention

BLOCKS = (
    (1, "BiLevelRoutingAttention", [{"topk": 2}]),
    (1, "nchwBRA", [{"topk": 2}]),
    (1, "BiFormerBlock", [{"topk": 2, "n_win": 4}]),
    (1, "C2BRA", [32, {"topk": 2, "n_win": 2}]),
    (1, "C3k2BRA", [32, {"topk": 2, "n_win": (2, 3)}]),
)
# At stride 4 maps are 8 x 8, 10 x 15 and 12 x 16. The first graph is for the first size only; one more graph
# must serve all other sizes. Every block pads one of the two maps of the second graph and not the other.
SIZES = ((32, 32), (40, 60), (48, 64), (32, 32))


def _model_of_every_block() -> DetectionModel:
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], *([-1, *block] for block in BLOCKS)]
    head = [[[len(rows) - 1], 1, "Detect", [2]]]
    return DetectionModel({"nc": 2, "backbone": rows, "head": head}, verbose=False)


def test_every_block_pads_one_map_of_the_second_graph_and_not_the_other() -> None:
    model, padded = _model_of_every_block(), {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            padded[name] = []
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: padded[name].append(module.grid(inputs[0]).is_padded)
            )
    for size in SIZES[1:3]:
        model(torch.randn(1, 3, *size))
    assert len(padded) == len(BLOCKS)
    assert all(sorted(each) == [False, True] for each in padded.values()), padded


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_of_every_block_is_one_graph_and_is_compiled_once_more_for_all_other_sizes(mode: str) -> None:
    """`fullgraph` forbids graph breaks. The stock head breaks the graph in eval, so it is left out there."""
    yolo = _model_of_every_block()
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
