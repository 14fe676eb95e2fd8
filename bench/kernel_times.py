"""What every kernel takes on the GPU at hand, beside what the kernel report predicts for that architecture.

    python -m bra_triton.bench.kernel_times [--preset yolo_p3 ...] [--dtype float16] [--json FILE]
                                            [--markdown]

Measured: medians of single launches inside whole forward and backward passes, read from PyTorch's profiler,
with a cold level-2 cache before every pass. Predicted: `kernel_report`'s bound, at the rates of that report's
GPU. Both are of the tiles that the package ships; what `bra-autotune` keeps for the user does not count here.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bra_triton import functional
from bra_triton.bench import kernel_report, report_tables, versions
from bra_triton.bench.cost import FLUSH_BYTES
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.presets import MODES, PRESETS, Preset
from bra_triton.kernels import tiles

REPEATS = 30
# Pooling's kernels are launched by a module of K/V down-sampling, which presets do not name.
CHOICES = {name: preset for name, preset in (PRESETS | MODES).items() if preset.kv_pooling is None}


def measure(preset: Preset, dtype: torch.dtype, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every launch on a GPU, by the kernel's name, over `REPEATS` forward and backward passes."""
    spec = preset.setting
    qkv = torch.randn(spec.batch, spec.height, spec.width, 2 * spec.qk_dim + spec.dim, device=device)
    qkv = qkv.to(dtype).requires_grad_()
    padding = torch.zeros(qkv.shape[-1], device=device, dtype=dtype) if spec.grid.is_padded else None
    lepe = [torch.randn(spec.dim, *rest, device=device, dtype=dtype) for rest in ((1, 3, 3), ())]
    for each in lepe:
        each.requires_grad_()
    grad_out = torch.randn_like(qkv[..., : spec.dim])
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def run() -> None:
        out = functional.bi_level_routing_attention(
            qkv,
            num_heads=spec.num_heads,
            n_win=spec.n_win,
            topk=spec.topk,
            lepe_weight=lepe[0],
            lepe_bias=lepe[1],
            padding=padding,
            soft_routing=preset.routing_weight == "soft",
            diff_routing=preset.routing_weight != "none",
            backend="triton",
        )
        torch.autograd.grad(out, (qkv, *lepe), grad_out)

    # What chooses the tiles is of this thread, and so the backward has to be.
    single = torch.autograd.set_multithreading_enabled(False)
    with single, tiles.use_architecture(tiles.architecture_of(device)):
        for _ in range(3):
            run()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(REPEATS):
                flush.zero_()
                run()
                torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            found.setdefault(event.name.removesuffix("_kernel"), []).append(
                event.time_range.elapsed_us() / 1e6
            )
    return found


def predicted(row: kernel_report.Row) -> tuple[float, str] | None:
    """Seconds of the bound that binds a launch, and its name; None where the report has none."""
    cost = row.cost or row.small
    return None if cost is None else (cost.bounds[cost.binding], cost.binding)


def compare_all(rows: Sequence[kernel_report.Row], measured: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A line for every row of one preset; of several launches of a kernel each row gets its own."""
    lines = []
    for index, row in enumerate(rows):
        times = measured.get(row.kernel, [])
        before, alike = (sum(other.kernel == row.kernel for other in some) for some in (rows[:index], rows))
        if len(times) == alike * REPEATS:  # else a kernel is launched twice as it is
            times = times[before::alike]
        lines.append(compare(row, times))
    return lines


def compare(row: kernel_report.Row, times: Sequence[float]) -> dict[str, Any]:
    """One line: medians in us; `ratio` is measured over predicted."""
    bound = predicted(row)
    median = statistics.median(times) if times else None
    return {
        "preset": row.preset,
        "kernel": row.kernel,
        "tile": _tile(row),
        "measured us": None if median is None else round(1e6 * median, 2),
        "predicted us": bound and round(1e6 * bound[0], 2),
        "binds": bound and bound[1],
        "ratio": round(median / bound[0], 2) if median and bound else None,
    }


def _tile(row: kernel_report.Row) -> str:
    code = row.analysis
    return f"{code.block_m}x{code.block_n}, {code.num_warps}" if code and code.loop else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 1 if a kernel of the report was not seen on the GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--dtype", choices=kernel_report.DTYPES, default="float16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--markdown", action="store_true", help="a table in Markdown")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to measure on; kernel_report predicts without one")
    device = torch.device("cuda")
    arch = tiles.architecture_of(device)
    if arch not in HARDWARE:
        parser.error(f"this GPU is {arch}; the cost model knows {', '.join(HARDWARE)}")
    presets = [CHOICES[name] for name in options.preset]
    rows = kernel_report.collect(presets, [arch], options.dtype, options.workers)
    lines = []
    for preset in presets:
        measured = measure(preset, kernel_report.DTYPES[options.dtype], device)
        lines += compare_all([row for row in rows if row.preset == preset.name], measured)
    described = versions.describe(device)
    if options.json:
        options.json.write_text(json.dumps({"versions": described, "kernels": lines}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in described.items() if value), end="\n\n")
    cells = [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines]
    print(report_tables.titled(f"Kernels, {options.dtype}", cells, options.markdown))
    unseen = [f"{line['preset']}: {line['kernel']}" for line in lines if line["measured us"] is None]
    print(*(f"not seen on the GPU: {name}" for name in unseen), sep="\n")
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
