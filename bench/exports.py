"""Times the module's export in other runtimes, beside an export of the einops reference.

Both have the same weights and 5 x 5 LePE, and are exported for one size of map. Before timing, each runtime's
output is compared with PyTorch's. A ratio of 1.1 means that our export is 1.1 times as fast.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from bra_triton.bench import measure
from bra_triton.bench.console import parser_of, write_json
from bra_triton.bench.models import INFERENCE, REFERENCE, Row, ratios, report
from bra_triton.bench.modules_alone import PRESET, module_pair
from bra_triton.bench.problems import Problem

LEAST_RATIO = 0.95  # not 1: the time of one export varies by 5 % from run to run


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if a ratio is below `LEAST_RATIO`."""
    parser = parser_of("exports", __doc__, repeats=9)
    options = parser.parse_args(arguments)
    exporters = {name: export for name, (package, export) in RUNTIMES.items() if find_spec(package)}
    if not exporters:
        parser.error(f"none of {', '.join(package for package, _ in RUNTIMES.values())} is installed")
    described = measure.circumstances(measure.CPU)
    print(measure.on_one_line(described), flush=True)
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn about their own code
        for (name, problem), (runtime, export) in product(PRESET.items(), exporters.items()):
            rows[f"{name}: {problem}, {runtime}"] = measure_exports(problem, export, options.repeats)
    title = "The module's export beside that of the einops reference, CPU, float32"
    print(report(title, "map, runtime", rows))
    write_json(options.json, {"versions": described, "rows": rows})
    slow = [name for name, row in rows.items() if not min(ratios(row).values()) >= LEAST_RATIO]
    print(f"at least {LEAST_RATIO} times as fast as the reference's: {'MISSED' if slow else 'met'}")
    return int(bool(slow))


def measure_exports(
    problem: Problem, export: Callable[[nn.Module, Tensor], Callable[[], Tensor]], repeats: int
) -> Row:
    """Milliseconds of our export and of the reference's; raises WrongResultError if an output is wrong."""
    modules, x = module_pair(problem, torch.float32)
    with torch.no_grad():
        expected = modules[REFERENCE].eval()(x)
    runs = {name: export(module.eval(), x) for name, module in modules.items()}
    found = {f"the output of the export, {name},": run() for name, run in runs.items()}
    measure.check(found, dict.fromkeys(found, expected), measure.TOLERANCE[x.dtype])
    seconds = measure.interleaved_minima(runs, measure.CPU, repeats)
    return {name: {f"{INFERENCE} ms": 1e3 * each} for name, each in seconds.items()}


def _onnx_runtime(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    with TemporaryDirectory() as folder:
        file = f"{folder}/module.onnx"
        torch.onnx.export(module, (x,), file, input_names=["x"], dynamo=False, opset_version=17)
        options = onnxruntime.SessionOptions()
        # By default its idle threads spin while they wait for work, which slows the other export down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(file, options)
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _openvino(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import openvino

    model = openvino.convert_model(module, example_input=x, input=[x.shape])
    # Ask for float32: on processors with bfloat16, OpenVINO computes in bfloat16 by default.
    run = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda: torch.from_numpy(run(x.numpy())[0])


RUNTIMES = {"ONNX Runtime": ("onnxruntime", _onnx_runtime), "OpenVINO": ("openvino", _openvino)}
