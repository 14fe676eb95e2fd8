"""Exported graphs of the NHWC drop-in hold plain PyTorch operators alone and compute the same."""

import pytest
import torch
from problems import relative_error

from bra_triton import BiLevelRoutingAttention


def _module():
    return BiLevelRoutingAttention(32, 2, 3, qk_dim=16, topk=4, auto_pad=True).eval()


def test_torchscript_trace():
    module, x = _module(), torch.randn(1, 10, 12, 32)
    traced = torch.jit.trace(module, x)
    assert "bra_triton::" not in str(traced.inlined_graph)
    y = torch.randn(1, 10, 12, 32)
    assert relative_error(traced(y), module(y).double()) < 1e-5


@pytest.mark.parametrize("size", [(9, 12), (10, 12)], ids=["divisible", "padded"])
def test_traced_graph_serves_other_sizes(size):
    """Whether the traced size needs padding must not be baked in."""
    module = _module()
    traced = torch.jit.trace(module, torch.randn(1, *size, 32), check_trace=False)
    for height, width in ((9, 12), (10, 12), (8, 17)):
        y = torch.randn(1, height, width, 32)
        assert relative_error(traced(y), module(y).double()) < 1e-5


def test_torch_export():
    module, x = _module(), torch.randn(1, 10, 12, 32)
    program = torch.export.export(module, (x,))
    assert "bra_triton::" not in str(program.graph)
    assert relative_error(program.module()(x), module(x).double()) < 1e-5


@pytest.mark.filterwarnings("ignore")  # traces warn of sizes that become constants
def test_onnx_with_a_negative_scale(tmp_path):
    """ONNX's attention takes the root of the scale."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module, x = BiLevelRoutingAttention(16, 2, 2, topk=2, qk_scale=-0.3).eval(), torch.randn(1, 8, 8, 16)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], opset_version=18)
    (actual,) = onnxruntime.InferenceSession(file).run(None, {"x": x.numpy()})
    assert relative_error(torch.from_numpy(actual), module(x).double()) < 1e-5
