"""Times every kernel on the GPU at hand, beside the kernel report's prediction for its architecture.

Measured times are medians of single launches inside whole forward and backward passes, read from PyTorch's
profiler, with a cold level-2 cache before every pass. Predicted times are the kernel report's bounds, at the
rates of `machine_code/hardware.py`. Both are for the tiles that the package ships, not for the user's own.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bra_triton.bench import kernel_report, measure
from bra_triton.bench.console import conclude, table, write_json
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.launches import plan_pass
from bra_triton.bench.problems import Problem
from bra_triton.kernels import forms, tiles

REPEATS = 30
# Without pooling: a module for down-sampling launches its kernels, and a problem has no such module.
CHOICES = {name: problem for name, problem in kernel_report.REPORTED.items() if problem.kv_pooling is None}


def times_of(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every launch on a GPU, by the kernel's name, over `REPEATS` forward and backward passes."""
    attention = problem.attention(lambda *shape: torch.randn(shape, device=device, dtype=dtype))
    tensors, grad_out = attention.tensors, torch.randn_like(attention.qkv[..., : problem.dim])
    with tiles.use_architecture(tiles.architecture_of(device)):
        forward, backward = plan_pass(attention)

    def run() -> None:
        _, kept = forward.run(*tensors)
        backward.run(*tensors, grad_out, None, kept)

    found = measure.launch_seconds(run, device, REPEATS)
    return {name.removesuffix("_kernel"): seconds for name, seconds in found.items()}


def compare(row: kernel_report.Row, times: Sequence[float]) -> dict[str, Any]:
    """One line of the table: median times in us; `ratio` is the measured time over the predicted one."""
    predicted, code = row.bounds[row.binding], row.analysis
    measured = statistics.median(times) if times else None
    return {
        "problem": row.problem.name,
        "kernel": row.kernel,
        "tile": f"{code.block_m}x{code.block_n}, {code.num_warps}" if code.loop else "",
        "measured us": measured and round(1e6 * measured, 2),
        "predicted us": round(1e6 * predicted, 2),
        "binds": row.binding,
        "ratio": measured and round(measured / predicted, 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if a kernel of the report was not seen on the GPU."""
    parser = kernel_report.kernel_options("kernel-times", __doc__, list(CHOICES), has_json=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to measure on; `bra-bench report` predicts without one")
    device = torch.device("cuda")
    arch = tiles.architecture_of(device)
    if arch not in HARDWARE:
        parser.error(f"this GPU is {arch}; the cost model knows {', '.join(HARDWARE)}")
    problems = [CHOICES[name] for name in options.problem]
    lines = []
    with forms.use_form(options.form):
        rows = kernel_report.collect(problems, [arch], options.dtype, options.workers)
        for problem in problems:
            measured = times_of(problem, measure.DTYPES[options.dtype], device)
            # No kernel is launched twice in a pass, so its name identifies its launches.
            lines += [compare(row, measured.get(row.kernel, [])) for row in rows if row.problem == problem]
    described = measure.circumstances(device)
    write_json(options.json, {"versions": described, "kernels": lines})
    print(measure.on_one_line(described), end="\n\n")
    print(table(f"Kernels, {options.dtype}", lines))
    unseen = [f"{line['problem']}: {line['kernel']}" for line in lines if line["measured us"] is None]
    return conclude(unseen, "not seen on the GPU")
