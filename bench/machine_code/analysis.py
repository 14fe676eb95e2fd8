"""Many kernels compiled and counted: in parallel processes, and none twice in one process."""

import importlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

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
        block_m: BLOCK_M of an attention kernel, else 0.
        block_n: BLOCK_N of an attention kernel, else 0.
        block_tail: list positions in a step of the tail's loop, 0 without one.
        n_taps: taps of a convolution in the epilogue, 0 without one.
        num_warps: warps of a thread block.
        usage: registers, shared memory, spills.
        loop: the loop over whole tiles of an attention kernel; None for others.
        tail: the loop over the rest of the list, None where none was found.
        taps: the loop over the convolution's taps, None where none was found.
        rest: all other code.
        loops: of other than attention kernels all loops, as `Sections` has them; else empty.
        straight: of such a kernel what stands in no loop; else None.
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
    loops: tuple[LoopMix, ...] = ()
    straight: LoopMix | None = None

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


_cache: dict[tuple, "Analysis | Exception"] = {}


def analyse(specimen: KernelSpecimen, arch: str) -> Analysis:
    """Compiles a kernel for an NVIDIA architecture and counts; a second call with the same arguments is free.

    Raises:
        ValueError: `arch` is unknown or AMD's.
        Exception: what the compiler raises for a configuration that it cannot compile.
    """
    key = _key(specimen, arch)
    if key not in _cache:
        _cache[key] = _try_to_analyse(specimen, arch)
    return _unwrap(_cache[key])


def analyse_all(jobs: Sequence[tuple[KernelSpecimen, str]], workers: int = 1) -> list["Analysis | Exception"]:
    """`analyse` for many (specimen, architecture), in order; what cannot compile yields its exception.

    Args:
        jobs: kernels must be functions of a module, so that another process finds them.
        workers: processes; 1 compiles in this one.
    """
    new = {}
    for specimen, arch in jobs:
        key = _key(specimen, arch)
        if key not in _cache and key not in new:
            new[key] = (specimen, arch)
    if workers > 1 and len(new) > workers:
        # Spawned, not forked: PyTorch's threads do not survive a fork.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            sent = [
                (replace(specimen, kernel=_name(specimen.kernel)), arch) for specimen, arch in new.values()
            ]
            done = list(pool.map(_analyse_named, sent, chunksize=4))
    else:
        done = [_try_to_analyse(specimen, arch) for specimen, arch in new.values()]
    _cache.update(zip(new, done, strict=True))
    return [_cache[_key(specimen, arch)] for specimen, arch in jobs]


def _try_to_analyse(specimen: KernelSpecimen, arch: str) -> "Analysis | Exception":
    try:
        compiled = compile_for(specimen, arch)
        parts = sections(compiled)
        usage = resource_usage(compiled)
    except Exception as error:  # Triton's compiler raises errors of many kinds
        return error
    block_m, block_n, block_tail = (_number(specimen, n) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_TAIL"))
    n_taps = max(_number(specimen, name) for name in ("LEPE_KERNEL", "KERNEL")) ** 2
    sizes = (block_m, block_n, block_tail, n_taps, specimen.num_warps)
    taps = parts.taps if n_taps else None
    if block_m and block_n and parts.loop is not None:
        return Analysis(*sizes, usage, parts.loop, parts.tail, taps, parts.rest)
    return Analysis(*sizes, usage, None, None, taps, parts.rest, parts.loops, parts.straight)


def _number(specimen: KernelSpecimen, name: str) -> int:
    value = specimen.constants.get(name, 0)
    return value if isinstance(value, int) else 0


def _analyse_named(job: tuple[KernelSpecimen, str]) -> "Analysis | Exception":
    specimen, arch = job
    module, name = specimen.kernel
    result = _try_to_analyse(replace(specimen, kernel=getattr(importlib.import_module(module), name)), arch)
    # Only the text of a compiler's error is certain to travel between processes.
    return RuntimeError(f"{type(result).__name__}: {result}") if isinstance(result, Exception) else result


def _name(kernel: Any) -> tuple[str, str]:
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel.__module__, kernel.__name__


def _key(specimen: KernelSpecimen, arch: str) -> tuple:
    mappings = (specimen.signature, specimen.constexprs, specimen.options)
    return (
        _name(specimen.kernel),
        arch,
        *(tuple(sorted((name, repr(value)) for name, value in mapping.items())) for mapping in mappings),
        specimen.divisible,
        specimen.num_warps,
        specimen.num_stages,
    )


def _unwrap(result: "Analysis | Exception") -> Analysis:
    if isinstance(result, Exception):
        raise result
    return result
