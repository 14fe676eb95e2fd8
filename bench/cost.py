"""What a piece of PyTorch costs: time in medians, and the memory it allocates on top of what was there."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# Written between two timed calls: several times the level-2 cache of any GPU.
FLUSH_BYTES = 1 << 28
# The GPU is kept busy while Python enqueues a timed call: for so many times what that took before, and
# at least for so long. A millisecond is 2 million cycles at 2 GHz, and longer on a slower GPU.
HEAD_START, LEAST_HEAD_START, CYCLES_A_SECOND = 2.0, 1e-3, 2e9


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; on the CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median wall time of `run` over `repeats` calls, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def median_device_seconds(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int = 30, warm_up: int = 5
) -> float:
    """Median time that a GPU works on one of `runs`, which are the same work on different inputs.

    The runs take turns. Before each the GPU's level-2 cache is overwritten, and the GPU is kept busy while
    Python enqueues the run, so that what it takes to launch kernels does not count (`median_seconds` counts
    it). On the CPU, whose caches stay as they are, it is the wall time.
    """
    enqueued = []
    for index in range(max(warm_up, len(runs))):
        synchronize(device)
        start = time.perf_counter()
        runs[index % len(runs)]()
        enqueued.append(time.perf_counter() - start)
    if device.type != "cuda":
        times = []
        for index in range(repeats):
            start = time.perf_counter()
            runs[index % len(runs)]()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    head_start = max(LEAST_HEAD_START, HEAD_START * max(enqueued[-2:]))  # the first ones compile
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for index, (start_event, end_event) in enumerate(events):
        synchronize(device)  # or a long queue would block, and Python fall behind again
        flush.zero_()
        torch.cuda._sleep(int(head_start * CYCLES_A_SECOND))
        start_event.record()
        runs[index % len(runs)]()
        end_event.record()
    synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run` held at once, beyond those allocated before it.

    Every allocation counts, those inside operators included: on the CPU they are read from the profiler's
    trace, since the CPU's allocator keeps no peak.
    """
    run()  # caches and lazily made buffers are not the run's
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what the profiler's library writes to the terminal about its own start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
