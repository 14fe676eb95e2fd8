"""Many kernels compiled and counted: in parallel processes, and none twice in one process."""

import importlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TypeAlias

from bra_triton.bench.machine_code.static_analysis import (
    KernelSpecimen,
    Sections,
    Usage,
    compile_for,
    resource_usage,
    sections,
)


@dataclass(frozen=True)
class Analysis(Sections):
    """What the machine code of one kernel says: its sections, and what they are to be multiplied by.

    Only attention kernels have a `loop` and a `tail` here, and only those with a convolution `taps`.
    """

    block_m: int  # BLOCK_M of an attention kernel, else 0; of a small map's kernel the rows of all its heads
    block_n: int  # BLOCK_N of an attention kernel, else 0; of a small map's kernel the tokens of a step
    block_tail: int  # list positions in a step of the tail's loop, 0 without one
    n_taps: int  # taps of a convolution in the epilogue, 0 without one
    num_warps: int  # of a thread block
    usage: Usage

    @property
    def slots_per_score(self) -> float:
        """Thread instruction slots that the loop spends on one score of a whole tile.

        Each warp executes the body once for a tile, and an instruction of a warp takes 32 slots. A loop that
        the compiler unrolled covers more than one tile; its `matrix` count shows it.

        Raises:
            ValueError: the kernel has no loop with matrix instructions.
        """
        if self.loop is None:
            raise ValueError("slots_per_score needs a loop with matrix instructions; this kernel has none")
        return self.loop.total * self.num_warps * 32 / (self.block_m * self.block_n)

    @property
    def serialised(self) -> bool:
        """Whether every matrix instruction of the loop waits for the one before (sm_90)."""
        return self.loop is not None and 0 < self.loop.counts["matrix"] <= self.loop.matrix_waits


Job: TypeAlias = tuple[KernelSpecimen, str]  # with the architecture
Result: TypeAlias = Analysis | Exception


def analyse_all(jobs: Sequence[Job], workers: int = 1) -> list[Result]:
    """Compiles kernels for NVIDIA architectures and counts; what cannot compile yields its exception.

    Args:
        jobs: kernels must be functions of a module, so that another process finds them.
        workers: processes; 1 compiles in this one.

    Returns:
        Results in the order of the jobs; those that are equal are compiled once.
    """
    distinct = {repr(job): job for job in jobs}
    found = dict(zip(distinct, analyse_each(list(distinct.values()), workers), strict=True))
    return [found[repr(job)] for job in jobs]


def analyse_each(jobs: Sequence[Job], workers: int = 1) -> Iterator[Result]:
    """`analyse_all` of jobs that differ: yields the results one by one."""
    if workers == 1 or len(jobs) <= workers:
        yield from (_try_to_analyse(*job) for job in jobs)
        return
    # A kernel travels to another process by its name.
    functions = [specimen.kernel.fn for specimen, _ in jobs]
    named = [
        replace(specimen, kernel=(function.__module__, function.__name__))
        for (specimen, _), function in zip(jobs, functions, strict=True)
    ]
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_analyse_named, named, [arch for _, arch in jobs])


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
    found = (loop, tail, parts.taps if n_taps else None, parts.rest)
    return Analysis(*found, block_m, block_n, block_tail, n_taps, specimen.num_warps, usage)


def _number(specimen: KernelSpecimen, name: str) -> int:
    value = specimen.constants.get(name, 0)
    return value if isinstance(value, int) else 0


def _analyse_named(specimen: KernelSpecimen, arch: str) -> Result:
    module, name = specimen.kernel
    kernel = getattr(importlib.import_module(module), name)
    result = _try_to_analyse(replace(specimen, kernel=kernel), arch)
    # Only the text of a compiler's error is certain to travel between processes.
    return RuntimeError(f"{type(result).__name__}: {result}") if isinstance(result, Exception) else result
