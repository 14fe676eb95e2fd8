"""Many kernels compiled and counted: in parallel processes, and none twice in one process."""

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, TypeAlias

from bra_triton.bench.machine_code.static_analysis import (
    KernelSpecimen,
    LoopMix,
    Usage,
    compile_for,
    issue_slots_per_score,
    resource_usage,
    sections,
)


@dataclass(frozen=True)
class Analysis:
    """What the machine code of one kernel says.

    Attributes:
        block_m: BLOCK_M of an attention kernel, else 0; of a small map's kernel the rows of all its heads.
        block_n: BLOCK_N of an attention kernel, else 0; of a small map's kernel the tokens of a step.
        block_tail: list positions in a step of the tail's loop, 0 without one.
        n_taps: taps of a convolution in the epilogue, 0 without one.
        num_warps: warps of a thread block.
        usage: registers, shared memory, spills.
        loop: the loop over whole tiles of an attention kernel; None for others.
        tail: the loop over the rest of the list, None where none was found.
        taps: the loop over the convolution's taps, None where none was found.
        rest: all other code.
    """

    block_m: int
    block_n: int
    block_tail: int
    n_taps: int
    num_warps: int
    usage: Usage
    loop: LoopMix | None
    tail: LoopMix | None
    taps: LoopMix | None
    rest: LoopMix

    @property
    def slots_per_score(self) -> float:
        """Issue slots that the loop spends on one score of a whole tile; an error without such a loop."""
        if self.loop is None:
            raise ValueError("slots_per_score needs a loop with matrix instructions; this kernel has none")
        return issue_slots_per_score(self.loop, self.block_m, self.block_n, self.num_warps)

    @property
    def serialised(self) -> bool:
        """Whether every matrix instruction of the loop waits for the one before (sm_90)."""
        return self.loop is not None and 0 < self.loop.counts["matrix"] <= self.loop.matrix_waits


Job: TypeAlias = tuple[KernelSpecimen, str]  # with the architecture
Result: TypeAlias = Analysis | Exception
_cache: dict[str, Result] = {}


def analyse_all(jobs: Sequence[Job], workers: int = 1) -> list[Result]:
    """Compiles kernels for NVIDIA architectures and counts; what cannot compile yields its exception.

    Args:
        jobs: kernels must be functions of a module, so that another process finds them.
        workers: processes; 1 compiles in this one.

    Returns:
        Results in the order of the jobs; a job that this process has compiled before is free.
    """
    keys = [repr(job) for job in jobs]
    new = {key: job for key, job in zip(keys, jobs, strict=True) if key not in _cache}
    for index, result in analyse_each(list(new.values()), workers):
        _cache[list(new)[index]] = result
    return [_cache[key] for key in keys]


def analyse_each(jobs: Sequence[Job], workers: int = 1) -> Iterator[tuple[int, Result]]:
    """`analyse_all` without its memory: yields a job's index and result as soon as it is compiled."""
    if workers == 1 or len(jobs) <= workers:
        yield from ((index, _try_to_analyse(*job)) for index, job in enumerate(jobs))
        return
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        pending = {}
        for index, (specimen, arch) in enumerate(jobs):
            named = replace(specimen, kernel=_name(specimen.kernel))
            pending[pool.submit(_analyse_named, named, arch)] = index
        for future in as_completed(pending):
            yield pending[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _try_to_analyse(specimen: KernelSpecimen, arch: str) -> Result:
    try:
        compiled = compile_for(specimen, arch)
        parts = sections(compiled)
        usage = resource_usage(compiled)
    except Exception as error:  # Triton's compiler raises errors of many kinds
        return error
    block_m, block_n, block_tail = (_number(specimen, n) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_TAIL"))
    if specimen.name.startswith("small_map"):  # a tile a head, and several heads
        block_m, block_n = (_number(specimen, n) for n in ("BLOCK_OWN", "BLOCK_STEP"))
        block_m *= _number(specimen, "HEADS")
    n_taps = max(_number(specimen, name) for name in ("LEPE_KERNEL", "KERNEL")) ** 2
    loop, tail = (parts.loop, parts.tail) if block_m and block_n else (None, None)
    sizes = (block_m, block_n, block_tail, n_taps, specimen.num_warps)
    return Analysis(*sizes, usage, loop, tail, parts.taps if n_taps else None, parts.rest)


def _number(specimen: KernelSpecimen, name: str) -> int:
    value = specimen.constants.get(name, 0)
    return value if isinstance(value, int) else 0


def _analyse_named(specimen: KernelSpecimen, arch: str) -> Result:
    module, name = specimen.kernel
    kernel = getattr(importlib.import_module(module), name)
    result = _try_to_analyse(replace(specimen, kernel=kernel), arch)
    # Only the text of a compiler's error is certain to travel between processes.
    return RuntimeError(f"{type(result).__name__}: {result}") if isinstance(result, Exception) else result


def _name(kernel: Any) -> tuple[str, str]:
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel.__module__, kernel.__name__
