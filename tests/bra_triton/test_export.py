"""Exported graphs hold only plain PyTorch operators, compute the same, and take maps of other sizes."""

import pytest
import torch
from problems import relative_error
from torch.export import Dim

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional
from bra_triton.backend import exported
from bra_triton.biformer import BiFormer
from bra_triton.modules.tokens import TokenBiLevelRoutingAttention

# Rounding of float32 gives errors of 1e-6, a wrong choice of a region 1e-1.
TOLERANCE = 1e-5
NUMBERS = {"num_heads": 2, "n_win": 3, "topk": 3, "auto_pad": True}
KINDS = (BiLevelRoutingAttention, NCHWBiLevelRoutingAttention)
after_2_8 = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"),
    reason="PyTorch 2.8 cannot tell that a side is at least 1, and exports to ONNX by TorchScript",
)
both_kinds = pytest.mark.parametrize("kind", KINDS)
# A multiple of n_win, and two maps that need padding; then small maps: regions of one token along a side, and
# sides shorter than n_win, along which the NCHW form has fewer than n_win regions.
SIZES = ((6, 9), (7, 8), (11, 13), (3, 4), (2, 7), (1, 1))
# Modes with another exported form: factors of the gathered tokens, projections, pooled keys and values.
MODES = {
    "negative scale": {"qk_scale": -0.3},
    "no LePE": {"side_dwconv": 0, "param_attention": "qkv"},
    "soft": {"soft_routing": True, "diff_routing": True, "param_routing": True, "qk_dim": 8},
    "ada_maxpool": {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 2},
    "fracpool": {"kv_downsample_mode": "fracpool", "kv_downsample_ratio": 2},
    "conv": {"kv_downsample_mode": "conv", "kv_downsample_ratio": 2, "kv_downsample_kernel": 1},
}


@pytest.fixture(params=["masked", "gathered"])
def form(request, monkeypatch):
    """Runs a test with both forms of the exported attention; `NUMBERS` alone give the masked form."""
    if request.param == "gathered":
        monkeypatch.setattr(exported, "_MOST_REGIONS_PER_CHOICE", 0)
    return request.param


def _map(kind, height, width, batch=1):
    shape = (height, width, 16) if kind is BiLevelRoutingAttention else (16, height, width)
    return torch.randn(batch, *shape)


def _axes(kind, batch, height, width):
    first = 1 if kind is BiLevelRoutingAttention else 2
    return {0: batch, first: height, first + 1: width}


def _check(module, exported, sizes=SIZES, batches=(1, 2), tolerance=TOLERANCE):
    """Compares an exported module with the eager module on the reference backend, in float64."""
    module.backend = "reference"
    for size in sizes:
        for batch in batches:
            x = _map(type(module), *size, batch)
            assert relative_error(exported(x), module.double()(x.double())) < tolerance, (size, batch)
            module.float()


@pytest.fixture
def onnx_run(tmp_path):
    """Exports to ONNX and returns the function that onnxruntime makes of the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # each constant of the newest opset gives a warning

    def export(module, x, **arguments):
        if arguments.get("dynamo", True):
            pytest.importorskip("onnxscript")
        file = str(tmp_path / "module.onnx")
        torch.onnx.export(module, (x,), file, input_names=["x"], verbose=False, **arguments)
        session = onnxruntime.InferenceSession(file, options)
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return export


@pytest.mark.usefixtures("form")
@both_kinds
@pytest.mark.parametrize("size", SIZES[1:4:2])
def test_torchscript_trace(kind, size):
    """Whether the example needs padding, and its number of regions, must not be constants of the trace."""
    module = kind(16, **NUMBERS).eval()
    traced = torch.jit.trace(module, _map(kind, *size), check_trace=False)
    assert "bra_triton::" not in str(traced.inlined_graph)
    _check(module, traced)


@pytest.mark.parametrize("mode", MODES)
def test_torchscript_trace_of_every_mode(mode):
    module = BiLevelRoutingAttention(16, **{**NUMBERS, **MODES[mode]}).eval()
    traced = torch.jit.trace(module, _map(BiLevelRoutingAttention, 7, 8), check_trace=False)
    _check(module, traced, ((7, 8), (9, 12)))


def test_equal_logits_choose_the_regions_of_smaller_index():
    """torch.topk does not define which of equal logits it takes."""

    def attend(backend):
        return lambda qkv: functional.bi_level_routing_attention(
            qkv, num_heads=1, n_win=8, topk=3, backend=backend
        )

    qkv = torch.randn(1, 16, 16, 24)
    qkv[..., :8] = 0  # so all logits are 0
    traced = torch.jit.trace(attend("torch"), qkv)
    assert relative_error(traced(qkv), attend("reference")(qkv.double())) < TOLERANCE


@after_2_8
def test_torch_export_with_named_sizes():
    """The graph must take every size in the ranges: PyTorch refuses to export code that compares sizes."""
    kind = BiLevelRoutingAttention
    module = kind(16, **NUMBERS).eval()
    sizes = _axes(kind, Dim("batch", max=8), Dim("height", min=6, max=99), Dim("width", min=6, max=99))
    program = torch.export.export(module, (_map(kind, 8, 10, batch=2),), dynamic_shapes=(sizes,))
    assert "bra_triton::" not in str(program.graph)
    _check(module, program.module(), ((9, 9), (7, 8), (6, 40)))


def test_torch_export_with_automatic_sizes():
    """Sizes may exceed the example's, so no guard may compare them."""
    kind = NCHWBiLevelRoutingAttention
    module = kind(16, **NUMBERS).eval()
    sizes = _axes(kind, Dim.AUTO, Dim.AUTO, Dim.AUTO)
    program = torch.export.export(module, (_map(kind, 8, 10, batch=2),), dynamic_shapes=(sizes,))
    _check(module, program.module(), ((9, 9), (7, 8), (21, 40), (2, 7)), batches=(1, 3))


@both_kinds
def test_exported_programs_hold_core_operators_alone(kind):
    """ExecuTorch takes core operators only. The module is inside another, whose submodules PyTorch wraps."""
    module = torch.nn.Sequential(kind(16, **NUMBERS)).eval()
    program = torch.export.export(module, (_map(kind, 7, 8),)).run_decompositions()
    operators = {node.target for node in program.graph.nodes if hasattr(node.target, "tags")}
    other = {str(operator) for operator in operators if torch.Tag.core not in operator.tags}
    assert other <= {"aten._assert_tensor_metadata.default"}  # an assertion that always holds
    axes = [node.meta["val"].dim() for node in program.graph.nodes if hasattr(node.meta.get("val"), "dim")]
    assert max(axes) == 4


@pytest.mark.usefixtures("form")
@pytest.mark.filterwarnings("ignore")  # of deprecation, and that only newer opsets fold constants
@both_kinds
@pytest.mark.parametrize("opset", [11, 20])  # the oldest still in use, and the exporter's newest
def test_onnx_by_the_legacy_exporter(kind, opset, onnx_run):
    module = kind(16, **NUMBERS).eval()
    axes = {"x": _axes(kind, "batch", "height", "width")}
    arguments = {"dynamo": False, "opset_version": opset, "dynamic_axes": axes}
    _check(module, onnx_run(module, _map(kind, 7, 8), **arguments))


@pytest.mark.usefixtures("form")
@pytest.mark.filterwarnings("ignore")
@both_kinds
def test_onnx_in_half_precision(kind, onnx_run):
    module = kind(16, **NUMBERS).eval().half()
    run = onnx_run(module, _map(kind, 7, 8).half(), dynamo=False)
    # Half precision rounds by up to 5e-4; the reference computes in float64, with the same rounded weights.
    _check(module, lambda x: run(x.half()), ((7, 8),), (1,), 5e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [11, 20])
def test_onnx_of_tokens(opset, onnx_run):
    """The legacy exporter passes all arguments by position, those with their default included."""
    module = TokenBiLevelRoutingAttention(16, **NUMBERS, size=(7, 8)).eval()
    run = onnx_run(module, torch.randn(1, 7 * 8, 16), dynamo=False, opset_version=opset)
    x = torch.randn(1, 7 * 8, 16)
    module.backend = "reference"
    assert relative_error(run(x), module.double()(x.double())) < TOLERANCE


@after_2_8
def test_torch_export_of_tokens_of_square_maps_of_any_size():
    """The number of tokens is a symbol, and PyTorch has no `isqrt` for symbols."""
    module = TokenBiLevelRoutingAttention(16, **NUMBERS).eval()
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    exported = torch.export.export(module, (torch.randn(2, 8 * 8, 16),), dynamic_shapes=sizes).module()
    module.backend = "reference"
    for side in (8, 9, 13):
        x = torch.randn(3, side * side, 16)
        assert relative_error(exported(x), module.double()(x.double())) < TOLERANCE, side
        module.float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [11, 20])
def test_onnx_of_biformer(opset, onnx_run):
    """The last stage is dense attention, for which opsets before 14 have no operator; sizes may change."""
    stages = {"depth": (1, 1), "embed_dim": (16, 16), "head_dim": 8, "n_win": 3, "topks": (3, -2)}
    model = BiFormer(**stages, num_classes=4, auto_pad=True).eval()
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    run = onnx_run(model, torch.randn(1, 3, 40, 48), dynamo=False, opset_version=opset, dynamic_axes=axes)
    for size in ((1, 3, 40, 48), (2, 3, 64, 36)):
        x = torch.randn(size)
        assert relative_error(run(x), model.double()(x.double())) < TOLERANCE, size
        model.float()


@after_2_8
@both_kinds
@pytest.mark.parametrize(("dynamic", "opset"), [(False, 18), (True, 18), (True, 23)])
def test_onnx_by_the_default_exporter(kind, dynamic, opset, onnx_run):
    module = kind(16, **NUMBERS).eval()
    axes = (_axes(kind, *[Dim.DYNAMIC] * 3),) if dynamic else None
    example = _map(kind, 7, 8, batch=2 if dynamic else 1)
    run = onnx_run(module, example, dynamic_shapes=axes, opset_version=opset)
    _check(module, run, SIZES if dynamic else ((7, 8),), (1, 2) if dynamic else (1,))


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_reference_chooses_the_same_regions(onnx_run):
    """In an export the reference uses another top-k, because ONNX has no stable sort."""
    module = BiLevelRoutingAttention(16, **NUMBERS, backend="reference").eval()
    x = _map(BiLevelRoutingAttention, 7, 8)
    exported = onnx_run(module, x, dynamo=False, opset_version=17)
    assert relative_error(exported(x), module.double()(x.double())) < TOLERANCE


def test_onnx_of_pooled_keys_in_opset_11(onnx_run):
    """Opset 11 has neither adaptive pooling nor a minimum of integers."""
    for mode in ("ada_maxpool", "fracpool"):
        module = BiLevelRoutingAttention(16, **{**NUMBERS, **MODES[mode]}).eval()
        x = _map(BiLevelRoutingAttention, 7, 8)
        run = onnx_run(module, x, dynamo=False, opset_version=11)
        _check(module, run, ((7, 8),), (1,))


@pytest.fixture(scope="session")
def openvino():
    """A function that converts a module to OpenVINO in float32; OpenVINO's default is bfloat16 on processors
    that have it.

    OpenVINO also runs the module without a trace, to check the trace: not under Triton's interpreter, which
    takes seconds.
    """
    package = pytest.importorskip("openvino")

    def convert(module, x, **arguments):
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            model = package.convert_model(module, example_input=x, **arguments)
        compiled = package.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda x: torch.from_numpy(compiled(x.numpy())[0])

    return convert


@pytest.mark.filterwarnings("ignore")  # of the tracer
@both_kinds
def test_openvino(kind, openvino):
    module = kind(16, **NUMBERS).eval()
    _check(module, openvino(module, _map(kind, 7, 8)))


class _AllModes(torch.nn.Module):
    """Both kinds, and every mode of the NHWC kind, in one graph: compiling each alone takes seconds."""

    def __init__(self):
        super().__init__()
        self.nchw = NCHWBiLevelRoutingAttention(16, **NUMBERS)
        modes = [{}, *MODES.values()]
        self.modes = torch.nn.ModuleList(BiLevelRoutingAttention(16, **{**NUMBERS, **mode}) for mode in modes)

    def forward(self, x):
        nchw = self.nchw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return torch.stack([nchw, *(module(x) for module in self.modes)])


@pytest.mark.usefixtures("form")
@pytest.mark.filterwarnings("ignore")
def test_openvino_for_one_size(openvino):
    """For a fixed size OpenVINO folds constants that depend on it, and fuses other operators."""
    module = _AllModes().eval()
    x = _map(BiLevelRoutingAttention, 7, 8)
    found = openvino(module, x, input=[x.shape])(x)
    for each in (module.nchw, *module.modes):
        each.backend = "reference"
    expected = module.double()(x.double())
    errors = {
        name: relative_error(*pair)
        for name, *pair in zip(("NCHW", "default", *MODES), found, expected, strict=True)
    }
    assert max(errors.values()) < TOLERANCE, errors
