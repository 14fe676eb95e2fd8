"""Times the module as other runtimes run it: its export beside an export of the einops reference.

Both have the same weights and 5 x 5 LePE, and are exported for one size. What a runtime gives is compared
with PyTorch before anything is timed. A ratio is what the reference's export takes over what ours takes, in
one run on the CPU: 1.1 means 1.1 times as fast.
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
from bra_triton.bench.models import INFERENCE, PRESET, REFERENCE, Row, module_pair, ratios, report
from bra_triton.bench.problems import Problem

LEAST_RATIO = 0.95  # runs of one export vary by as much


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 where our export is slower than the reference's."""
    parser = parser_of("exports", __doc__, repeats=9)
    options = parser.parse_args(arguments)
    exporters = {name: export for name, (package, export) in RUNTIMES.items() if find_spec(package)}
    if not exporters:
        parser.error(f"none of {', '.join(package for package, _ in RUNTIMES.values())} is installed")
    described = measure.circumstances(measure.CPU)
    print(measure.on_one_line(described), flush=True)
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about their own code
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
    """Seconds of our export and of the reference's, which take turns.

    Raises:
        WrongResultError: what a runtime gives is not what PyTorch gives.
    """
    modules, x = module_pair(problem)
    with torch.no_grad():
        expected = modules[REFERENCE].eval()(x)
    runs = {name: export(module.eval(), x) for name, module in modules.items()}
    for name, run in runs.items():
        what = f"the output of the export, {name},"
        measure.check({what: run()}, {what: expected}, measure.TOLERANCE[x.dtype])
    seconds = measure.interleaved_minima(runs, measure.CPU, repeats)
    return {name: {f"{INFERENCE} ms": 1e3 * each} for name, each in seconds.items()}


def _onnx_runtime(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    with TemporaryDirectory() as folder:
        file = f"{folder}/module.onnx"
        torch.onnx.export(module, (x,), file, input_names=["x"], dynamo=False, opset_version=17)
        options = onnxruntime.SessionOptions()
        # Else its threads, waiting for more work, keep the other export's from running.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(file, options)
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _openvino(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import openvino

    model = openvino.convert_model(module, example_input=x, input=[x.shape])
    # In float32: on processors that have bfloat16 it takes that by default.
    run = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda: torch.from_numpy(run(x.numpy())[0])


RUNTIMES = {"ONNX Runtime": ("onnxruntime", _onnx_runtime), "OpenVINO": ("openvino", _openvino)}
