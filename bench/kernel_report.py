"""The kernel report: what every kernel costs as it is shipped, beside plain dense attention. Needs no GPU.

    python -m bra_triton.bench.kernel_report [--arch sm_90 ...] [--dtype float16] [--preset yolo_p3 ...]
                                             [--json FILE] [--markdown] [--workers 2]

All of it is compiled and counted, or predicted from those counts (`machine_code/cost_model.py`); nothing is
measured. The exit status is 1 when a target is missed, when a shipped configuration does not compile, or when
one spills in float16 on sm_80 or sm_90.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bra_triton.bench import report_tables
from bra_triton.bench.machine_code import dense_floor
from bra_triton.bench.machine_code.analysis import Analysis, analyse_all
from bra_triton.bench.machine_code.cost_model import ATTENTION_KERNELS, Cost, predict
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.launches import Launch, record_attention
from bra_triton.bench.machine_code.small_kernels import SmallCost, predict_small
from bra_triton.bench.presets import MODES, PRESETS, Preset
from bra_triton.bench.tuning.search_space import EXP_SHARE
from bra_triton.kernels import tiles as tile_tables

# Issue slots per score of the shipped loop over those of a dense loop in the same tile, at most: float16,
# regions of TARGET_REGION_TOKENS and more. What is left of the difference is what routing costs. The leanest
# routed loop of all tiles is within these of the leanest dense one, too, which a test holds; neither is the
# fastest (docs/kernel_times.md).
TARGETS = {"attention_forward": 1.08, "query_gradient": 1.12, "key_value_gradient": 1.12}
TARGET_ARCHITECTURES = ("sm_80", "sm_90")
TARGET_HEADS = (32, 64)
TARGET_REGION_TOKENS = 100

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TRITON_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
Problem = tuple[Preset, str, Launch]


@dataclass(frozen=True)
class Shared:
    """A kernel with a share of its exponentials evaluated by multiply-adds."""

    analysis: Analysis
    cost: Cost


@dataclass(frozen=True)
class Row:
    """One kernel of one preset on one architecture.

    Attributes:
        preset: name of the problem.
        arch: architecture.
        kernel: name of the kernel.
        analysis: its counts; None when it does not compile.
        error: the compiler's, when it does not compile.
        checked: whether a spill is a failure.
        cost: prediction, for attention kernels.
        small: prediction, for the others.
        floor: the dense loop in the same tile, for attention kernels; None where it spills.
        target: largest ratio to the floor; None where none is set.
        shared: the same with a share of its exponentials by multiply-adds, where the exponential unit
            binds the launch; else None.
    """

    preset: str
    arch: str
    kernel: str
    analysis: Analysis | None
    error: str | None
    checked: bool
    cost: Cost | None
    small: SmallCost | None
    floor: dense_floor.Floor | None
    target: float | None
    shared: Shared | None = None

    @property
    def ratio(self) -> float | None:
        """Issue slots per score of the loop over the floor's."""
        if self.floor is None or self.analysis is None or self.analysis.loop is None:
            return None
        return self.analysis.slots_per_score / self.floor.slots_per_score

    @property
    def failures(self) -> list[str]:
        """What makes the report fail, in words."""
        where = f"{self.preset}, {self.arch}, {self.kernel}"
        if self.analysis is None:
            return [f"{where}: does not compile: {self.error}"]
        found = []
        if self.checked and self.analysis.usage.spills:
            found.append(f"{where}: {self.analysis.usage.spills} instructions spill")
        if self.target is not None and self.ratio is None:
            found.append(f"{where}: no loop, or no spill-free dense floor to compare with")
        if self.target is not None and self.ratio is not None and self.ratio > self.target:
            found.append(f"{where}: {self.ratio:.3f} times the dense floor, target {self.target}")
        return found


def shipped(preset: Preset, dtype: torch.dtype, arch: str) -> list[Launch]:
    """What a forward and backward of a preset launches on an architecture, every kernel once."""
    with tile_tables.use_architecture(arch):
        launched = record_attention(preset.setting, dtype)
    kernels = [launch.specimen for launch in launched]
    return [launch for i, launch in enumerate(launched) if launch.specimen not in kernels[:i]]


def target_of(kernel: str, preset: Preset, arch: str, dtype: str) -> float | None:
    """The largest ratio to the dense floor that an attention kernel may have; None where none is set."""
    large = preset.region_tokens >= TARGET_REGION_TOKENS and preset.head_dim in TARGET_HEADS
    plain = preset.routing_weight == "none" and preset.kv_per_win is None
    return TARGETS[kernel] if plain and large and _is_checked(arch, dtype) else None


def collect(
    presets: Sequence[Preset],
    architectures: Sequence[str],
    dtype: str = "float16",
    workers: int = 1,
) -> list[Row]:
    """Compiles what the presets launch and the dense floors beside it.

    Args:
        presets: problems.
        architectures: keys of `hardware.HARDWARE`.
        dtype: a key of `DTYPES`.
        workers: processes that compile.
    """
    jobs = [
        (preset, arch, launch)
        for arch in architectures
        for preset in presets
        for launch in shipped(preset, DTYPES[dtype], arch)
    ]
    analyses = analyse_all([(launch.specimen, arch) for _, arch, launch in jobs], workers)
    names = [_floor_name(preset, arch, launch) for preset, arch, launch in jobs]
    wanted = {
        name: _dense_tiles(launch)
        for name, (_, _, launch) in zip(names, jobs, strict=True)
        if name[0] in ATTENTION_KERNELS
    }
    floors = dense_floor.find_floors(wanted, _TRITON_DTYPES[dtype], workers)
    rows = [
        _row(job, result, dtype, floors.get(name))
        for job, name, result in zip(jobs, names, analyses, strict=True)
    ]
    return _with_shared(rows, jobs, dtype, workers)


def _floor_name(preset: Preset, arch: str, launch: Launch) -> dense_floor.Name:
    tile = next(map(str, _dense_tiles(launch)), "")
    return launch.specimen.name, preset.head_dim, arch, tile


def _dense_tiles(launch: Launch) -> tuple[dense_floor.DenseTile, ...]:
    """Dense loops in the tile of an attention kernel; none for others."""
    kernel = launch.specimen
    if kernel.name not in ATTENTION_KERNELS:
        return ()
    sides = (kernel.constants["BLOCK_M"], kernel.constants["BLOCK_N"])
    own, step = reversed(sides) if kernel.name == "key_value_gradient" else sides
    return dense_floor.of_tile(own, step, kernel.num_warps, kernel.num_stages)


def _with_shared(rows: list[Row], jobs: Sequence[Problem], dtype: str, workers: int) -> list[Row]:
    """The rows, with `Row.shared` where the exponential unit binds."""
    bound = [
        (
            index,
            replace(
                specimen, constexprs={**specimen.constexprs, "CONFIG": config._replace(EXP_SHARE=EXP_SHARE)}
            ),
        )
        for index, (row, (_, _, launch)) in enumerate(zip(rows, jobs, strict=True))
        for specimen in [launch.specimen]
        for config in [specimen.constexprs["CONFIG"]]
        if DTYPES[dtype].itemsize == 2 and row.cost and row.cost.binding == "exponential"
        if specimen.name in ("attention_forward", "query_gradient")
        if config.EXP_SHARE == 0 and config.BLOCK_N >= 8 * EXP_SHARE
    ]
    analyses = analyse_all([(specimen, rows[index].arch) for index, specimen in bound], workers)
    for (index, specimen), analysis in zip(bound, analyses, strict=True):
        if isinstance(analysis, Analysis):
            row, (preset, _, _) = rows[index], jobs[index]
            problem = preset.sizes(2, "marks" in specimen.signature)
            cost = predict(row.kernel, analysis, problem, HARDWARE[row.arch])
            rows[index] = replace(row, shared=Shared(analysis, cost))
    return rows


def _is_checked(arch: str, dtype: str) -> bool:
    return dtype == "float16" and arch in TARGET_ARCHITECTURES


def _row(job: Problem, result: Analysis | Exception, dtype: str, floor: dense_floor.Floor | None) -> Row:
    preset, arch, launch = job
    specimen = launch.specimen
    analysis = None if isinstance(result, Exception) else result
    cost = small = target = None
    if specimen.name in ATTENTION_KERNELS:
        passes = 3 if specimen.constants.get("PRECISION") == "tf32x3" else 1
        if analysis is not None and analysis.loop is not None:
            problem = preset.sizes(DTYPES[dtype].itemsize, "marks" in specimen.signature)
            cost = predict(specimen.name, analysis, problem, HARDWARE[arch], passes)
        target = target_of(specimen.name, preset, arch, dtype)
    elif analysis is not None:
        small = predict_small(specimen.name, analysis, launch.grid, launch.arguments, HARDWARE[arch])
    error = str(result) if isinstance(result, Exception) else None
    checked = _is_checked(arch, dtype)
    return Row(preset.name, arch, specimen.name, analysis, error, checked, cost, small, floor, target)


def as_json(rows: Sequence[Row]) -> list[dict]:
    """The rows as plain data."""
    result = []
    for row in rows:
        data = asdict(row) | {"ratio": row.ratio, "failures": row.failures}
        if row.analysis is not None and row.analysis.loop is not None:
            data["slots_per_score"] = row.analysis.slots_per_score
        if row.cost is not None:
            data["slots_per_useful_score"] = row.cost.slots_per_useful_score
            fits = row.cost.resident_warps > 0  # JSON has no infinity
            data["seconds_per_useful_score"] = row.cost.seconds_per_useful_score if fits else None
            data["binding"] = row.cost.binding
        if row.small is not None:
            data["binding"] = row.small.binding
        result.append(data)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(description="What every kernel costs, compiled and predicted: no GPU.")
    parser.add_argument("--arch", nargs="+", choices=HARDWARE, default=list(TARGET_ARCHITECTURES))
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--preset", nargs="+", choices=PRESETS | MODES, default=list(PRESETS | MODES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    presets = [(PRESETS | MODES)[name] for name in options.preset]
    rows = collect(presets, options.arch, options.dtype, options.workers)
    if options.json:
        options.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
    print(report_tables.render(rows, options.markdown))
    failures = [failure for row in rows for failure in row.failures]
    print(*failures or ["All targets are met, and nothing spills where that is checked."], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
