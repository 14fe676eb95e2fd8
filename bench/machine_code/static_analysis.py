"""What a Triton kernel costs on a GPU, read from its machine code: no GPU is needed.

`compile_for` compiles a `KernelSpecimen` for a named architecture, `resource_usage` tells its registers,
shared memory and spills, `sections` counts the instructions of its loops.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Opcode patterns of the classes that are counted; an instruction belongs to the first that fits.
INSTRUCTION_CLASSES = {
    "exponentials": r"MUFU\.EX2",
    "matrix": r"\w+MMA",  # HMMA, HGMMA, UTCHMMA and their kin of other types
    "global_loads": r"LD|LDG|LDGSTS|UTMALDG|UBLKCP",  # asynchronous copies and TMA included
    "global_stores": r"ST|STG|RED|REDG|ATOM|ATOMG|UTMASTG|UTMAREDG|UBLKRED",
    "fp32": r"F(ADD|MUL|FMA)2?|FMNMX3?|FSETP|FSEL|FSET|FCHK|FSWZADD",
    "integer": r"IMAD(?!\.MOV)|IADD|IADD3|IMUL|IMNMX|ISETP|IABS|IDP|ISCADD|LEA|LOP|LOP3|PLOP3|SHF|SHL|SHR|SEL"
    r"|SGXT|BMSK|BREV|FLO|POPC|PRMT|P2R|R2P|VIADD|VIADDMNMX|VIMNMX|VIMNMX3",
    "other": r".*",  # shared memory, moves, conversions, barriers, branches, waits, ...
}


@dataclass(frozen=True)
class KernelSpecimen:
    """A kernel together with everything a launch would decide about it.

    A launch makes constants of `None` and of the integer 1, so such arguments belong in `constexprs` even
    where the kernel does not say `tl.constexpr`. A group of pointers has a tuple in `signature`, of the
    group's own type, in which "constexpr" stands for an absent pointer. `divisible` names the run-time
    arguments that are multiples of 16 (bytes for a pointer), "maps.query" in a group; `None` stands for
    every pointer and no integer.
    """

    name: str  # for reports
    kernel: Any  # a @triton.jit function
    signature: Mapping[str, Any]  # Triton type of each run-time argument: "*fp16", "i32", "fp32", ...
    constexprs: Mapping[str, object] = field(default_factory=dict)  # value of each other argument
    divisible: frozenset[str] | None = None
    num_warps: int = 4
    num_stages: int = 3

    @property
    def constants(self) -> dict[str, object]:
        """Compile-time arguments by name, those of the group `CONFIG` by their own names."""
        config: Any = self.constexprs.get("CONFIG")
        return {**self.constexprs, **(config._asdict() if config is not None else {})}


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture."""

    arch: str  # a key of TARGETS
    symbol: str  # the kernel's name in the machine code
    shared_bytes: int  # shared memory that a launch asks for, per thread block
    asm: Mapping[str, Any]  # ttir, ttgir, llir; then ptx and cubin, or amdgcn and hsaco

    @cached_property
    def sass(self) -> str:
        """The listing that `nvdisasm -c` prints; raises `ValueError` for an AMD architecture."""
        if "cubin" not in self.asm:
            raise ValueError(f"{self.arch} has no SASS; only the sm_ architectures do")
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
class LoopMix:
    """The instructions of one loop body, or of other code.

    Everything that can run between the loop's header and its jump back counts once, whether or not a
    predicate or a branch skips it at run time, and so do blocks that the assembler moved out of line and
    loops nested inside. The code of called functions does not count.
    """

    counts: Mapping[str, int]  # for every key of INSTRUCTION_CLASSES
    # Waits for matrix instructions of a warpgroup. As many as those, and ptxas has serialised them: it was
    # short of registers, and each now waits for the one before.
    matrix_waits: int = 0

    @property
    def total(self) -> int:
        """All instructions of the body."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Sections:
    """The code of a kernel, every instruction that can be reached in one of them.

    Attributes:
        loop: of the innermost loops with the most matrix instructions, the shortest: over whole tiles, where
            others mask. None without matrix instructions.
        tail: the largest other innermost loop with matrix instructions; None where there is none.
        taps: the largest innermost loop that loads and has no matrix instructions: over the taps of a
            convolution, if there is one. None where there is none.
        rest: everything else, each instruction once.
    """

    loop: LoopMix | None
    tail: LoopMix | None
    taps: LoopMix | None
    rest: LoopMix


def resource_usage(compiled: Compiled) -> Usage:
    """Registers, shared memory and spills of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        return _amd_usage(compiled)
    report = _run_nvidia_tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    found = re.search(rf"Function {re.escape(compiled.symbol)}:\s+REG:(\d+) STACK:(\d+)", report)
    assert found, f"cuobjdump reported nothing about {compiled.symbol}:\n{report}"
    opcodes = [opcode.split(".")[0] for _, opcode, _ in _instructions(compiled.sass)[0]]
    # The report's own SHARED leaves out Triton's memory, which is allocated at launch.
    spills = opcodes.count("LDL") + opcodes.count("STL")
    waits = re.findall(r"ttg\.async_wait\b.*?num = (\d+)", compiled.asm["ttgir"])
    return Usage(int(found[1]), compiled.shared_bytes, int(found[2]), spills, max(map(int, waits), default=0))


def sections(compiled: Compiled) -> Sections:
    """Takes a kernel's code apart. Raises `ValueError` for an AMD architecture."""
    program, labels = _instructions(compiled.sass)
    successors = _successors(program, labels)
    entries = [index for label, index in labels.items() if label.startswith(".text.")]
    loops = _natural_loops(successors, entries)
    mixes = {header: _mix_of(program, body) for header, body in loops.items()}
    with_matrix = _innermost({h: loops[h] for h in loops if mixes[h].counts["matrix"]})
    inside = set().union(*(loops[header] for header in with_matrix))
    loading = _innermost({h: loops[h] for h in loops.keys() - inside if mixes[h].counts["global_loads"]})
    main = max(with_matrix, key=lambda h: (mixes[h].counts["matrix"], -mixes[h].total), default=None)
    others = (
        max(found, key=lambda h: mixes[h].total, default=None) for found in (with_matrix - {main}, loading)
    )
    chosen = (main, *others)
    reached = _reachable(successors, entries, barred=-1) - {-1, len(program)}
    rest = reached.difference(*(loops[header] for header in chosen if header is not None))
    loop, tail, taps = (None if header is None else mixes[header] for header in chosen)
    return Sections(loop, tail, taps, _mix_of(program, rest))


# Only the next three functions touch Triton's own interface, which changes between its versions.


def compile_for(specimen: KernelSpecimen, arch: str) -> Compiled:
    """Compile a kernel for `arch`, a key of `TARGETS`, as a launch on such a GPU would.

    Raises:
        ValueError: `arch` is not such a key, or `signature` and `constexprs` are not together exactly
            the arguments of the kernel.
        TypeError: the kernel was not made by `@triton.jit`; under `TRITON_INTERPRET=1` none is.
    """
    if arch not in TARGETS:
        raise ValueError(f"unknown architecture {arch!r}; use one of {', '.join(TARGETS)}")
    target, kernel = TARGETS[arch], specimen.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel!r} is not a @triton.jit function (is TRITON_INTERPRET set?)")
    given = [*specimen.signature, *specimen.constexprs]
    if sorted(given) != sorted(kernel.arg_names):
        raise ValueError(f"{specimen.name} takes {kernel.arg_names}, but was given {given}")
    signature = {name: specimen.signature.get(name, "constexpr") for name in kernel.arg_names}
    constants: dict[tuple[int, ...], object] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for path, name, kind in _arguments(signature):
        if kind == "constexpr":
            constants[path] = specimen.constexprs.get(name)  # absent members of groups are None
            continue
        is_pointer = kind.startswith("*")
        is_divisible = is_pointer if specimen.divisible is None else name in specimen.divisible
        attrs[path] = [["tt.divisibility", 16]] if is_divisible else []
        if is_pointer and target.backend == "hip":
            # A launch says so of tensors below 2 GiB; AMD's buffer instructions depend on it.
            attrs[path].append(["tt.pointer_range", 32])
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    built = triton.compile(source, target=target, options=options)
    return Compiled(arch, built.metadata.name, built.metadata.shared, built.asm)


def _arguments(signature: Mapping[str, Any]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Path, name and type of every argument, groups taken apart: ((0, 2), "maps.value", "*fp16")."""
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            for inner, (field_name, member) in enumerate(kind._asdict().items()):  # type: ignore[attr-defined]
                yield (index, inner), f"{name}.{field_name}", member
        else:
            yield (index,), name, kind


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


def _mix_of(program: list[_Instruction], body: set[int]) -> LoopMix:
    counts = dict.fromkeys(INSTRUCTION_CLASSES, 0)
    opcodes = [program[index][1] for index in body]
    for opcode in opcodes:
        counts[next(n for n, p in INSTRUCTION_CLASSES.items() if re.match(rf"(?:{p})(?:\.|$)", opcode))] += 1
    return LoopMix(counts, sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes))


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
