"""Measures time (medians and minima) and memory, checks results, and names the card, versions and commit."""

import datetime
import itertools
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bra_triton.kernels.tiles import cache as tile_cache

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
_DESCRIBE = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
# Bytes that are overwritten before a timed call: several times the level-2 cache of any GPU.
FLUSH_BYTES = 1 << 28
# While Python enqueues a timed call, the GPU is kept busy HEAD_START times as long as enqueueing took in the
# warm-up, within the bounds (seconds). The upper bound is enough: a queue holds about a thousand launches,
# and enqueueing these takes less time. The GPU waits for cycles of a 2 GHz clock; a slower one waits longer.
HEAD_START, HEAD_START_BOUNDS, CYCLES_PER_SECOND = 2.0, (1e-3, 0.1), 2e9
# The largest error (norm of the difference over norm of the truth) of outputs and gradients whose scores and
# sums are kept in float32 or rounded to the dtype. A missing or wrong region gives an error of 0.1 or more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Run = Callable[[], object]
Name = TypeVar("Name")


class WrongResultError(RuntimeError):
    """The call that is to be timed computes a wrong result."""


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Raises WrongResultError if a result's error, relative to the truth's norm, is above `tolerance`."""
    for name, actual in found.items():
        exact = expected[name]
        # The truth may be 0, such as the gradient of a routing weight that is always 1 (`topk` 1).
        error = ((actual.to(exact.dtype) - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        if not error <= tolerance:  # NaN is refused
            raise WrongResultError(f"{name} is off by {error:.1e}, more than {tolerance:.0e}")


def call_of(module: nn.Module, x: Tensor, phase: str) -> Run:
    """A call of a module: its forward without gradients ("no grad") or with ("grad"), or a training "step".

    The loss of a step is the sum of the output; a step has no optimizer.
    """
    if phase == "no grad":
        return torch.no_grad()(lambda: module(x))
    x = x.clone().requires_grad_()
    if phase == "grad":
        return lambda: module(x)
    return lambda: module(x).sum().backward()


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wall_seconds(run: Run, device: torch.device = CPU, *, waits: bool = True) -> float:
    """Seconds of one call, from an idle device until it returns, or with `waits` until the device is idle."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    if waits:
        wait()
    return time.perf_counter() - start


def interleaved_minima(
    runs: Mapping[Name, Run], device: torch.device, repeats: int, *, waits: bool = False
) -> dict[Name, float]:
    """The smallest time of each run in seconds, until the call returns or, with `waits`, the device is idle.

    The runs take turns, so that disturbances of the machine affect all of them alike; the minimum is the time
    without disturbance. The order changes in every turn: a run is faster after one that ran the same code.
    """
    order, shuffler = list(runs), random.Random(0)
    for run in runs.values():
        run()
        run()  # the first call compiles, and the second may still fill caches
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        shuffler.shuffle(order)
        for name in order:
            best[name] = min(best[name], wall_seconds(runs[name], device, waits=waits))
    return best


def median_device_seconds(run: Run, device: torch.device, repeats: int = 30, warm_up: int = 5) -> float:
    """Median time in seconds that the device works on a run.

    Before each call the GPU's level-2 cache is overwritten, and the GPU is kept busy while Python enqueues
    the call, so that the time to launch kernels does not count. On the CPU this is the plain wall time.
    """
    enqueued = [wall_seconds(run, device, waits=False) for _ in range(warm_up)]
    if device.type != "cuda":
        return statistics.median(wall_seconds(run) for _ in range(repeats))
    least, most = HEAD_START_BOUNDS
    head_start = min(most, max(least, HEAD_START * max(enqueued[-2:])))  # the first calls compile
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        torch.cuda.synchronize(device)  # empties the queue: a full one would block Python
        flush.zero_()
        torch.cuda._sleep(int(head_start * CYCLES_PER_SECOND))
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def launch_seconds(run: Run, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every launch on a GPU during `repeats` calls with a cold level-2 cache, by kernel name."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for _ in range(3):
        run()
    with _profile(ProfilerActivity.CUDA) as profiler:
        for _ in range(repeats):
            flush.zero_()
            run()
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    return found


def operator_calls(run: Run) -> int:
    """How many PyTorch operators (`aten::`) a call runs, including those inside other operators."""
    run()
    with _profile(ProfilerActivity.CPU) as profiler:
        run()
    return sum(event.name.startswith("aten::") for event in profiler.events())


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes that `run` held at once, beyond those allocated before it.

    Every allocation counts, including those inside operators. On the CPU they are read from the profiler's
    trace, because the CPU's allocator records no peak.
    """
    run()  # makes caches and buffers, which do not count
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _profile(ProfilerActivity.CPU, profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def _profile(activity: ProfilerActivity, *, profile_memory: bool = False) -> profile:
    # Else the profiler's library, Kineto, prints that it starts; the level that Ultralytics sets is too low.
    os.environ["KINETO_LOG_LEVEL"] = "99"
    return profile(activities=[activity], profile_memory=profile_memory)


def process_peak_bytes() -> int:
    """The most memory that this process has held resident so far, libraries included."""
    if sys.platform == "linux":  # where ru_maxrss is at least the parent process's
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    if sys.platform == "win32":
        import psutil  # Ultralytics requires it

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def circumstances(device: torch.device) -> dict[str, str | None]:
    """Date, card, driver, processor, versions and commit; None for those that are missing."""
    on_gpu = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "card": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _first_line(*query) if on_gpu else None,
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": tile_cache.triton_version() or None,
        "python": platform.python_version(),
        # The user sets the variable for a copy without git; git adds `-dirty` if files of a checkout changed.
        "commit": os.environ.get("BRA_TRITON_COMMIT") or _first_line(*_DESCRIBE),
    }


def on_one_line(described: Mapping[str, str | None]) -> str:
    """`circumstances` as text."""
    return ", ".join(f"{key} {value}" for key, value in described.items() if value)


@cache  # `nvidia-smi` takes a second
def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
