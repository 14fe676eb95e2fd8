"""Reads the cost of a Triton kernel from its machine code; no GPU is needed.

`compile_for` compiles the kernel of a launch, `resource_usage` finds its registers, shared memory and spills,
`sections` counts the instructions of its loops, and `analyse` does all three.
"""

import copyreg
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import triton
from triton.runtime import JITFunction

from bra_triton.bench import stand_in
from bra_triton.bench.console import progress
from bra_triton.bench.machine_code.launches import arguments_of, kernel_name
from bra_triton.kernels.plan import Launch

# Opcode patterns of instructions, by column of the kernel report; the first one that matches counts.
INSTRUCTION_CLASSES = {
    "exp": r"MUFU\.EX2",
    "matrix": r"\w+MMA",  # HMMA, HGMMA, UTCHMMA and the like for other types
    "fp32": r"F(ADD|MUL|FMA)2?|FMNMX3?|FSETP|FSEL|FSET|FCHK|FSWZADD",
    "int": r"IMAD(?!\.MOV)|IADD|IADD3|IMUL|IMNMX|ISETP|IABS|IDP|ISCADD|LEA|LOP|LOP3|PLOP3|SHF|SHL|SHR|SEL"
    r"|SGXT|BMSK|BREV|FLO|POPC|PRMT|P2R|R2P|VIADD|VIADDMNMX|VIMNMX|VIMNMX3",
    "loads": r"LD|LDG|LDGSTS|UTMALDG|UBLKCP",  # of global memory, asynchronous copies and TMA included
    "other": r".*",  # stores, shared memory, moves, conversions, barriers, branches, waits, ...
}
Mix: TypeAlias = Counter[str]  # instructions by their class


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for an architecture."""

    shared_bytes: int  # shared memory that a launch asks for, per thread block
    asm: Mapping[str, Any]  # ttir, ttgir, llir; then ptx and cubin, or amdgcn and hsaco

    @cached_property
    def sass(self) -> str:
        """The listing that `nvdisasm -c` prints; for NVIDIA only."""
        return _run_nvidia_tool("nvdisasm", "-c", self.asm["cubin"])


@dataclass(frozen=True)
class Usage:
    """What one thread or thread block of a kernel occupies."""

    registers: int  # per thread; AMD: vector registers per lane, accumulation registers included
    shared_bytes: int  # per thread block
    stack_bytes: int  # local memory per thread, where spills go
    spills: int  # instructions in the whole kernel that load from local memory or store to it
    # Asynchronous copies that may still run after a loop has waited for its step's; 0 if it waits for all.
    copies_in_flight: int = 0


@dataclass(frozen=True)
class Sections:
    """The code of a kernel in sections; every reachable instruction is in one of them.

    The section of a loop that does not exist is empty. Every instruction that can run between a loop's header
    and its jump back counts once, even if a predicate or a branch may skip it at run time. This includes
    blocks that the assembler moved out of line, and nested loops, but not the code of called functions.
    """

    # The innermost loop with the most matrix instructions; of several the shortest: the others also mask.
    loop: Mix
    tail: Mix  # the largest other innermost loop with matrix instructions
    taps: Mix  # the largest with loads but no matrix instructions: over a convolution's taps, if there is one
    rest: Mix  # everything else, each instruction once
    # Whether every matrix instruction of the loop waits for the one before it (sm_90): the loop then has at
    # least as many waits as matrix instructions. ptxas adds these waits when it is short of registers.
    serialised: bool


@dataclass(frozen=True)
class Analysis(Sections):
    """The sections of a kernel's machine code, and the numbers by which they are multiplied.

    Only attention kernels have a `loop` and a `tail` here, and only kernels with a convolution have `taps`.
    """

    block_m: int  # BLOCK_M of an attention kernel; the rows of all heads of a small map's kernel; else 0
    block_n: int  # BLOCK_N of an attention kernel; the tokens of a step of a small map's kernel; else 0
    block_tail: int  # list positions in a step of the tail's loop, 0 without one
    n_taps: int  # taps of a convolution in the epilogue, 0 without one
    num_warps: int  # of a thread block
    usage: Usage

    @property
    def slots_per_score(self) -> float:
        """Thread instruction slots (32 per instruction) that the loop takes for one score of a whole tile.

        If the compiler has unrolled the loop, this figure is too high; the loop's `matrix` count shows it.
        """
        return self.loop.total() * self.num_warps * 32 / (self.block_m * self.block_n)


Result: TypeAlias = Analysis | Exception
Job: TypeAlias = tuple[Launch, str]  # a launch and the architecture to compile it for
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def in_processes(
    function: Callable[[Launch, str], R], jobs: Mapping[K, Job], workers: int = 1
) -> dict[K, R | Exception]:
    """Calls a function that compiles, such as `analyse`, for every job; prints the progress to stderr.

    Several workers are processes: they import the function and the kernels, which must be on the top level of
    a module. The result of a job that raised an exception is a RuntimeError with its text.
    """
    call, results = partial(_call, function), {}
    # Spawned, not forked: PyTorch's threads do not survive a fork. An unused pool starts no process.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = (pool.map if 1 < workers < len(jobs) else map)(call, jobs.values())
        for (key, (launch, arch)), result in zip(jobs.items(), found, strict=True):
            results[key] = result
            progress(len(results), len(jobs), f"{kernel_name(launch)} compiled for {arch}")
    return results


# Kernels are pickled by name, as functions are.
copyreg.pickle(JITFunction, attrgetter("__name__"))


def _call(function: Callable[[Launch, str], R], job: Job) -> R | Exception:
    try:
        return function(*job)
    except Exception as error:  # Triton's errors are of many kinds, some cannot be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")


def analyse(launch: Launch, arch: str) -> Analysis:
    """Compiles the kernel of a launch for an NVIDIA architecture, and counts its instructions."""
    compiled = compile_for(launch, arch)
    parts, arguments = sections(compiled), arguments_of(launch)
    block_m, block_n, block_tail = (arguments.get(name, 0) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_TAIL"))
    if launch.name.startswith("small_map"):  # several heads, each with a tile
        block_m, block_n = arguments["BLOCK_OWN"] * arguments["HEADS"], arguments["BLOCK_STEP"]
    n_taps = max(arguments.get(name, 0) for name in ("LEPE_KERNEL", "KERNEL")) ** 2
    loop, tail = (parts.loop, parts.tail) if block_m and block_n else (Mix(), Mix())
    found = (loop, tail, parts.taps if n_taps else Mix(), parts.rest, parts.serialised)
    num_warps = launch.options.get("num_warps", 4)  # Triton's default
    return Analysis(*found, block_m, block_n, block_tail, n_taps, num_warps, resource_usage(compiled))


def compile_for(launch: Launch, arch: str) -> Compiled:
    """Compiles a kernel for `arch`, a key of `TARGETS`, as for a launch; TypeError if it is interpreted."""
    if not isinstance(launch.kernel, JITFunction):
        raise TypeError(f"{launch.kernel!r} is not a @triton.jit function (is TRITON_INTERPRET set?)")
    with stand_in.driver_of(arch, device=arch):
        built = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    return Compiled(built.metadata.shared, built.asm)


def resource_usage(compiled: Compiled) -> Usage:
    """Registers, shared memory and spills of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        return _amd_usage(compiled)
    report = _run_nvidia_tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)  # the code has one function
    assert found, report
    opcodes = [opcode.split(".")[0] for _, opcode, _ in _instructions(compiled.sass)[0]]
    # Shared memory is Triton's figure: SHARED of the report leaves out what Triton allocates at launch.
    spills = opcodes.count("LDL") + opcodes.count("STL")
    waits = re.findall(r"ttg\.async_wait\b.*?num = (\d+)", compiled.asm["ttgir"])
    return Usage(int(found[1]), compiled.shared_bytes, int(found[2]), spills, max(map(int, waits), default=0))


def sections(compiled: Compiled) -> Sections:
    """Divides the code of an NVIDIA kernel into sections."""
    program, labels = _instructions(compiled.sass)
    successors = _successors(program, labels)
    entries = [index for label, index in labels.items() if label.startswith(".text.")]
    loops = _natural_loops(successors, entries)
    mixes = {header: _mix_of(program, body) for header, body in loops.items()}
    with_matrix = _innermost({h: loops[h] for h in loops if mixes[h]["matrix"]})
    inside = set().union(*(loops[header] for header in with_matrix))
    outside = (h for h in loops.keys() - inside if not mixes[h]["matrix"])  # nor around a matrix loop
    loading = _innermost({h: loops[h] for h in outside if mixes[h]["loads"]})
    main = max(with_matrix, key=lambda h: (mixes[h]["matrix"], -mixes[h].total()), default=None)
    others = (with_matrix - {main}, loading)
    chosen = (main, *(max(found, key=lambda h: mixes[h].total(), default=None) for found in others))
    reached = _reachable(successors, entries, barred=-1) - {-1, len(program)}
    rest = reached.difference(*(loops[header] for header in chosen if header is not None))
    loop, tail, taps = (Mix() if header is None else mixes[header] for header in chosen)
    body = () if main is None else loops[main]
    waits = sum(program[index][1].startswith("WARPGROUP.DEPBAR") for index in body)
    return Sections(loop, tail, taps, _mix_of(program, rest), 0 < loop["matrix"] <= waits)


def _run_nvidia_tool(tool: str, flag: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, tool).path, flag, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd_usage(compiled: Compiled) -> Usage:
    text = compiled.asm["amdgcn"]
    metadata = dict(re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", text, re.MULTILINE))
    shared_bytes, stack_bytes = (int(metadata[f"{kind}_segment_fixed_size"]) for kind in ("group", "private"))
    spills = len(re.findall(r"^\s*scratch_(?:load|store)", text, re.MULTILINE))
    return Usage(int(metadata["vgpr_count"]), shared_bytes + compiled.shared_bytes, stack_bytes, spills)


_Instruction = tuple[str | None, str, str]  # predicate, opcode with its modifiers (LDG.E.128), operands


def _instructions(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions of a listing in order, and for each label the index of the instruction after it."""
    program: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            program.append((found[1], found[2], found[3]))
        elif found := re.match(r"([.$\w]+):\s*$", line):
            labels[found[1]] = len(program)
    return program, labels


def _mix_of(program: list[_Instruction], body: set[int]) -> Mix:
    mix = Counter(dict.fromkeys(INSTRUCTION_CLASSES, 0))
    for opcode in (program[index][1] for index in body):
        mix[next(n for n, p in INSTRUCTION_CLASSES.items() if re.match(rf"(?:{p})(?:\.|$)", opcode))] += 1
    return mix


def _innermost(loops: Mapping[int, set[int]]) -> set[int]:
    """Headers of the loops that contain no other one of `loops`."""
    return {header for header, body in loops.items() if body & loops.keys() == {header}}


def _successors(program: list[_Instruction], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction, the indices of those that can run next."""
    result = []
    for index, (predicate, opcode, operands) in enumerate(program):
        base = opcode.split(".")[0]
        targets: list[int] = []
        if base in {"BRA", "BRX", "JMP", "CALL"}:
            targets = [labels[name] for name in re.findall(r"[.$\w]+", operands) if name in labels]
        # A BRA with a condition before its label may go on with the next instruction. A CALL of a plain
        # label, by which code for sm_8x leaves some loops, does not return; a CALL of a function does.
        leaves = base in {"EXIT", "RET", "BRX"} or operands.startswith("`(.L")
        if (predicate or not leaves) and index + 1 < len(program):
            targets.append(index + 1)
        result.append(targets)
    return result


def _natural_loops(successors: list[list[int]], entries: list[int]) -> dict[int, set[int]]:
    """The body of each loop, by its header.

    A jump to a header is a jump back if every path from the entries to the jump passes the header. A jump to
    a lower address need not be one: waits that the assembler moved out of line also return by such jumps. The
    body is the header, and all instructions from which a path leads to a jump back without passing it.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for source, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(source)
    bodies: dict[int, set[int]] = {}
    jumps = ((source, header) for source, targets in enumerate(successors) for header in targets)
    for source, header in jumps:
        if header <= source and source not in _reachable(successors, entries, barred=header):
            bodies.setdefault(header, set()).update(_reachable(predecessors, [source], barred=header))
    return bodies


def _reachable(graph: list[list[int]], start: list[int], barred: int) -> set[int]:
    """All nodes that paths from `start` reach without passing `barred`, and `barred` itself."""
    seen = {barred}
    pending = list(start)
    while pending:
        if (node := pending.pop()) not in seen:
            seen.add(node)
            pending += graph[node]
    return seen
