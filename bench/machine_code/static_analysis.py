"""What a Triton kernel costs on a GPU, read from its machine code: no GPU is needed.

`compile_for` compiles the kernel of a launch for a named architecture, `resource_usage` tells its registers,
shared memory and spills, `sections` counts the instructions of its loops. `analyse` does all three, and
`each` calls it for many launches in parallel processes.
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

# Opcode patterns of what is counted, by its column in the kernel report; an instruction belongs to the first
# that fits.
INSTRUCTION_CLASSES = {
    "exp": r"MUFU\.EX2",
    "matrix": r"\w+MMA",  # HMMA, HGMMA, UTCHMMA and their kin of other types
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
        """The listing that `nvdisasm -c` prints, of a kernel for NVIDIA."""
        return _run_nvidia_tool("nvdisasm", "-c", self.asm["cubin"])


@dataclass(frozen=True)
class Usage:
    """What one thread or thread block of a kernel occupies."""

    registers: int  # per thread; AMD: vector registers per lane, accumulation registers included
    shared_bytes: int  # per thread block
    stack_bytes: int  # local memory per thread, where spills go
    spills: int  # instructions in the whole kernel that load from local memory or store to it
    # Asynchronous copies of later steps that still run when a loop has waited for those of its step: 0 where
    # it waits for all, and so for memory in every step.
    copies_in_flight: int = 0


@dataclass(frozen=True)
class Sections:
    """The code of a kernel, every instruction that can be reached in one of them; empty for no such loop.

    Everything that can run between a loop's header and its jump back counts once, whether or not a predicate
    or a branch skips it at run time, and so do blocks that the assembler moved out of line and loops nested
    inside. The code of called functions does not count.
    """

    # Of the innermost loops with the most matrix instructions the shortest: over whole tiles, others mask.
    loop: Mix
    tail: Mix  # the largest other innermost loop with matrix instructions
    taps: Mix  # the largest that loads and has none: over a convolution's taps, if there is one
    rest: Mix  # everything else, each instruction once
    # Whether every matrix instruction of the loop waits for the one before (sm_90): there are as many waits,
    # since ptxas was short of registers.
    serialised: bool


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
        """Thread instruction slots, 32 an instruction, that the loop spends on one score of a whole tile.

        A loop that the compiler unrolled covers more than one tile; its `matrix` count shows it.
        """
        return self.loop.total() * self.num_warps * 32 / (self.block_m * self.block_n)


Result: TypeAlias = Analysis | Exception
Job: TypeAlias = tuple[Launch, str]  # with an architecture
K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


def each(
    function: Callable[[Launch, str], R], jobs: Mapping[K, Job], workers: int = 1
) -> dict[K, R | Exception]:
    """Calls `analyse`, or what else compiles, for every job; tells stderr how far it is.

    Several workers are processes: the function, like the kernels, must be one of a module, so that they find
    it. In the place of a result may be the exception that the job raised.
    """
    call, results = partial(_call, function), {}
    # Spawned, not forked: PyTorch's threads do not survive a fork. None is started before it is needed.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = (pool.map if 1 < workers < len(jobs) else map)(call, jobs.values())
        for (key, (launch, arch)), result in zip(jobs.items(), found, strict=True):
            results[key] = result
            progress(len(results), len(jobs), f"{kernel_name(launch)} compiled for {arch}")
    return results


# A kernel travels to another process by its name.
copyreg.pickle(JITFunction, attrgetter("__name__"))


def _call(function: Callable[[Launch, str], R], job: Job) -> R | Exception:
    try:
        return function(*job)
    except Exception as error:  # Triton's compiler raises errors of many kinds, which may not travel
        return RuntimeError(f"{type(error).__name__}: {error}")


def analyse(launch: Launch, arch: str) -> Analysis:
    """Compiles the kernel of a launch for an NVIDIA architecture, and counts."""
    compiled = compile_for(launch, arch)
    parts, arguments = sections(compiled), arguments_of(launch)
    block_m, block_n, block_tail = (arguments.get(name, 0) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_TAIL"))
    if launch.name.startswith("small_map"):  # a tile a head, and several heads
        block_m, block_n = arguments["BLOCK_OWN"] * arguments["HEADS"], arguments["BLOCK_STEP"]
    n_taps = max(arguments.get(name, 0) for name in ("LEPE_KERNEL", "KERNEL")) ** 2
    loop, tail = (parts.loop, parts.tail) if block_m and block_n else (Mix(), Mix())
    found = (loop, tail, parts.taps if n_taps else Mix(), parts.rest, parts.serialised)
    num_warps = launch.options.get("num_warps", 4)  # Triton's default
    return Analysis(*found, block_m, block_n, block_tail, n_taps, num_warps, resource_usage(compiled))


def compile_for(launch: Launch, arch: str) -> Compiled:
    """Compiles a kernel for `arch`, a key of `TARGETS`, as Triton does for a launch on such a GPU.

    Raises:
        TypeError: the kernel was not made by `@triton.jit`; under `TRITON_INTERPRET=1` none is.
    """
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
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)  # of the one function that there is
    assert found, report
    opcodes = [opcode.split(".")[0] for _, opcode, _ in _instructions(compiled.sass)[0]]
    # The report's own SHARED leaves out Triton's memory, which is allocated at launch.
    spills = opcodes.count("LDL") + opcodes.count("STL")
    waits = re.findall(r"ttg\.async_wait\b.*?num = (\d+)", compiled.asm["ttgir"])
    return Usage(int(found[1]), compiled.shared_bytes, int(found[2]), spills, max(map(int, waits), default=0))


def sections(compiled: Compiled) -> Sections:
    """Takes the code of a kernel for NVIDIA apart."""
    program, labels = _instructions(compiled.sass)
    successors = _successors(program, labels)
    entries = [index for label, index in labels.items() if label.startswith(".text.")]
    loops = _natural_loops(successors, entries)
    mixes = {header: _mix_of(program, body) for header, body in loops.items()}
    with_matrix = _innermost({h: loops[h] for h in loops if mixes[h]["matrix"]})
    inside = set().union(*(loops[header] for header in with_matrix))
    loading = _innermost({h: loops[h] for h in loops.keys() - inside if mixes[h]["loads"]})
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
    """The instructions of a listing in order, and the index of the one that follows each label."""
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
    """Headers of the loops that hold no other of them."""
    return {header for header, body in loops.items() if body & loops.keys() == {header}}


def _successors(program: list[_Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Which instructions can run after each."""
    result = []
    for index, (predicate, opcode, operands) in enumerate(program):
        base = opcode.split(".")[0]
        targets: list[int] = []
        if base in {"BRA", "BRX", "JMP", "CALL"}:
            targets = [labels[name] for name in re.findall(r"[.$\w]+", operands) if name in labels]
        # A BRA may have its condition before the label. A CALL of a mere label, by which code for sm_8x
        # leaves some loops, does not come back; a CALL of a function does.
        leaves = base in {"EXIT", "RET", "BRX"} or operands.startswith("`(.L")
        if (predicate or not leaves) and index + 1 < len(program):
            targets.append(index + 1)
        result.append(targets)
    return result


def _natural_loops(successors: list[list[int]], entries: list[int]) -> dict[int, set[int]]:
    """The body of each loop by its header: what reaches a jump back to the header without passing it.

    A jump back is one that every path reaches through its target. Jumping to a lower address is not enough:
    waits that the assembler moved out of line also do so, to return.
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
    """`barred` and the nodes that paths from `start` reach without passing it."""
    seen = {barred}
    pending = list(start)
    while pending:
        if (node := pending.pop()) not in seen:
            seen.add(node)
            pending += graph[node]
    return seen
