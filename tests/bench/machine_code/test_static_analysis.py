"""Kernels compiled for GPUs that this machine need not have, and the analysis of their machine code."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from bra_triton.bench.machine_code.hardware import TARGETS
from bra_triton.bench.machine_code.launches import kernel_name, record_attention
from bra_triton.bench.machine_code.static_analysis import (
    INSTRUCTION_CLASSES,
    Compiled,
    analyse,
    compile_for,
    resource_usage,
    sections,
)
from bra_triton.bench.problems import MODELS
from bra_triton.kernels.arrays import Buffer
from bra_triton.kernels.plan import Launch

pytestmark = pytest.mark.compiled
NVIDIA = [arch for arch in TARGETS if arch.startswith("sm_")]


@triton.jit
def attend(q, k, v, out, keys, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Attention without its softmax's normalisation: one exponential for each score."""
    rows, columns, channels = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + channels[None, :])
    acc = tl.zeros([M, D], tl.float32)
    for start in range(0, keys, N):
        offsets = (start + columns)[:, None] * D + channels[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(k + offsets)))
        acc = tl.dot(tl.exp2(scores).to(v.dtype.element_ty), tl.load(v + offsets), acc)
    tl.store(out + rows[:, None] * D + channels[None, :], acc)


@triton.jit
def attend_twice(q, k, v, out, keys, heads, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """A loop nested in a loop, then a loop with steps of twice as many columns."""
    for head in range(heads):
        attend(q + head * M * D, k, v, out + head * M * D, keys, D, M, N)
    attend(q, v, k, out, keys, D, M, 2 * N)


@triton.jit
def column_sum(x, out, rows, bias, scale, ROOT: tl.constexpr, N: tl.constexpr):
    """A loop without matrix instructions."""
    columns = tl.arange(0, N)
    acc = tl.zeros([N], tl.float32)
    for row in range(rows):
        acc += tl.load(x + row * N + columns)
    if ROOT:
        acc = tl.sqrt(acc)
    if bias is not None:
        acc += tl.load(bias + columns)
    tl.store(out + columns, acc * scale)


def launched(kernel, pointers, numbers, **options):
    """A launch of a kernel of this file; a dtype in `pointers` stands for an aligned pointer to it."""
    return Launch(kernel, (1,), pointers, numbers, options)


HALF = (torch.float16,) * 3
ATTEND = launched(attend, (*HALF, torch.float32), (99, 32, 128, 64), num_stages=2)
COLUMN_SUM = launched(column_sum, (torch.float16, torch.float32), (99, None, 0.5, True, 1024))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", TARGETS)
def test_every_architecture_compiles_every_dtype(arch, dtype):
    compiled = compile_for(launched(attend, (*[dtype] * 3, torch.float32), (99, 16, 64, 32)), arch)
    usage = resource_usage(compiled)
    assert 16 <= usage.registers <= 512
    assert usage.shared_bytes > 0
    assert (usage.stack_bytes, usage.spills) == (0, 0)


def test_a_plain_function_is_no_kernel():
    with pytest.raises(TypeError, match=r"not a @triton\.jit function"):
        compile_for(replace(ATTEND, kernel=len), "sm_80")


@pytest.mark.parametrize("arch", NVIDIA)
def test_the_inner_loop_of_attention(arch):
    compiled = compile_for(ATTEND, arch)
    found = sections(compiled)
    assert not found.tail
    assert found.loop.keys() == INSTRUCTION_CLASSES.keys()
    assert found.loop["exp"] == 128 * 64 // (4 * 32)
    assert found.loop["matrix"] >= 2
    assert found.loop["loads"] == 2 * 64 * 32 * 2 // (16 * 128)
    assert "LDG.E.128" in compiled.sass
    assert "LDG.E.U16" not in compiled.sass


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_of_two_matrix_loops_the_larger_and_the_other_without_the_loop_around(arch):
    twice = replace(ATTEND, kernel=attend_twice, numbers=(99, 7, *ATTEND.numbers[1:]))
    found = sections(compile_for(twice, arch))
    assert [mix["exp"] for mix in (found.loop, found.tail)] == [128, 64]
    assert found.loop.total() > found.tail.total()


def test_the_loop_of_a_small_maps_backward_is_over_queries_and_its_tail_over_keys():
    """The cost model multiplies them by these numbers of steps.

    A program that owns keys steps over queries, with four products for a score; one that owns queries steps
    over keys, with three.
    """
    launches = record_attention(MODELS["biformer_stage2"], torch.bfloat16)
    launch = next(launch for launch in launches if kernel_name(launch) == "small_map_backward")
    code = analyse(launch, "sm_90")
    tile = code.block_m * code.block_n  # for `num_warps` heads; a product of 16 x 8 x 16 is one instruction
    product = tile * 32 // (16 * 8 * 16) // code.num_warps
    assert (code.loop["matrix"], code.tail["matrix"]) == (4 * product, 3 * product)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_spills_show(arch):
    cramped = replace(ATTEND, numbers=(99, 64, 128, 64), options={"num_warps": 1, "num_stages": 2})
    usage = resource_usage(compile_for(cramped, arch))
    assert usage.stack_bytes > 0
    assert usage.spills > 100


@pytest.mark.parametrize(("num_stages", "copies"), [(1, 0), (2, 0), (3, 2), (4, 4)])
def test_copies_that_a_step_does_not_wait_for(num_stages, copies):
    """The copies are keys and values of later steps: of one step with three stages, of two with four."""
    usage = resource_usage(compile_for(replace(ATTEND, options={"num_stages": num_stages}), "sm_80"))
    assert usage.copies_in_flight == copies


def test_spills_show_on_amd():
    huge = replace(ATTEND, numbers=(99, 128, 256, 32), options={"num_warps": 1, "num_stages": 2})
    crowded = resource_usage(compile_for(huge, "gfx942"))
    assert crowded.stack_bytes > 0
    assert crowded.spills > 100


@pytest.mark.parametrize(("offset", "load"), [(16, "LDG.E.128"), (2, "LDG.E.U16")])
def test_without_divisibility_loads_are_narrow(offset, load):
    x = Buffer(0, offset, (7, 1024), (1024, 1), torch.float16)
    compiled = compile_for(replace(COLUMN_SUM, pointers=(x, torch.float32)), "sm_90")
    assert not sections(compiled).loop
    loads = {word.removesuffix(".CONSTANT") for word in compiled.sass.split() if word.startswith("LDG")}
    assert loads == {load}


def from_listing(*lines):
    """A compiled kernel of these SASS lines: a line that ends in a colon is a label, else an instruction."""
    text = [line if line.endswith(":") else f"        /*0000*/    {line} ;" for line in lines]
    compiled = Compiled(0, {})
    compiled.__dict__["sass"] = "\n".join([".text.attend:", *text])  # where cached_property would put it
    return compiled


def test_a_kernel_without_a_loop():
    compiled = from_listing("@P0 BRA `(.L_x_0)", "HMMA.16816.F32 R4, R8, R12, R4", ".L_x_0:", "EXIT")
    found = sections(compiled)
    assert (found.loop.total(), found.rest.total()) == (0, 3)


def test_a_loop_left_by_a_predicated_call():
    body = ["HMMA.16816.F32 R4, R8, R12, R4", "@P2 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)"]
    loop = sections(from_listing("MOV R4, RZ", ".L_x_0:", *body, ".L_x_1:", "STG.E [R2], R4", "EXIT")).loop
    assert (loop.total(), loop["matrix"], loop["other"]) == (3, 1, 2)


def test_a_wait_moved_out_of_line_belongs_to_its_loop_and_is_no_second_one():
    body = [
        "SYNCS P1, [UR4]",
        "@!P1 BRA `(.L_x_2)",
        ".L_x_1:",
        "HGMMA.64x64x16.F32 R4, R8",
        "BRA.U UP0, `(.L_x_0)",
    ]
    wait = [".L_x_2:", "SYNCS P1, [UR4]", "@!P1 BRA `(.L_x_2)", "BRA `(.L_x_1)"]
    found = sections(from_listing(".L_x_0:", *body, "EXIT", *wait))
    assert (found.loop.total(), found.tail.total()) == (7, 0)


def test_sections_of_a_kernel():
    main = [".L_x_0:", "HMMA.16816.F32 R4", "FADD R1", "SYNCS P1, [UR4]", "@P0 BRA `(.L_x_0)"]
    masked = [".L_x_1:", "HMMA.16816.F32 R4", "FSEL R1", "FADD R1", "FADD R1", "@P0 BRA `(.L_x_1)"]
    taps = [".L_x_3:", "LDG.E R1", "FFMA R1", "@P0 BRA `(.L_x_3)"]
    wait = [".L_x_4:", "SYNCS P1, [UR4]", "@!P1 BRA `(.L_x_4)"]
    end = ["STG.E [R2], R4", "EXIT", ".L_x_2:", "BRA `(.L_x_2)", "NOP"]
    found = sections(from_listing("MOV R4, RZ", *main, *masked, *taps, *wait, *end))
    assert (found.loop.total(), found.loop["fp32"]) == (4, 1)
    assert (found.tail.total(), found.tail["matrix"]) == (5, 1)
    assert (found.taps.total(), found.taps["loads"]) == (3, 1)
    # `rest` has MOV, the wait (two instructions), the store and EXIT, but not the endless loop and the NOP
    # with which the assembler ends a kernel.
    assert (found.rest.total(), found.rest["matrix"], found.rest["other"]) == (5, 0, 5)


def test_a_loop_that_waits_inside_is_still_the_innermost():
    body = [".L_x_0:", "HGMMA.64x64x16.F32 R4, R8", ".L_x_1:", "SYNCS P1, [UR4]", "@!P1 BRA `(.L_x_1)"]
    found = sections(from_listing(*body, "LDG.E R1", "@P0 BRA `(.L_x_0)", "EXIT"))
    assert [mix.total() for mix in (found.loop, found.tail, found.taps, found.rest)] == [5, 0, 0, 1]


def test_a_loop_around_a_matrix_loop_is_not_over_taps():
    inner = [".L_x_1:", "HMMA.16816.F32 R4", "FADD R1", "@P0 BRA `(.L_x_1)"]
    around = [".L_x_0:", "LDG.E R1", *inner, "@P1 BRA `(.L_x_0)", "EXIT"]
    found = sections(from_listing(*around))
    assert [mix.total() for mix in (found.loop, found.tail, found.taps, found.rest)] == [3, 0, 0, 3]
    taps = [".L_x_2:", "LDG.E R1", "@P2 BRA `(.L_x_2)"]
    assert sections(from_listing(*taps, *around)).taps.total() == 2


def test_without_matrix_instructions_there_are_no_walks():
    found = sections(from_listing(".L_x_0:", "FADD R1", "@P0 BRA `(.L_x_0)", "EXIT"))
    assert [mix.total() for mix in (found.loop, found.tail, found.taps, found.rest)] == [0, 0, 0, 3]


def test_waits_for_every_matrix_instruction_show():
    body = ["HGMMA.64x64x16.F32 R4, R8", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    end = ["@P0 BRA `(.L_x_0)", "EXIT"]
    assert sections(from_listing(".L_x_0:", *body, *body, *end)).serialised
    assert not sections(from_listing(".L_x_0:", *body, body[0], *end)).serialised


def test_classes_tell_alike_opcodes_apart():
    opcodes = {
        "exp": ["MUFU.EX2"],
        "matrix": ["HMMA.16816.F32", "UTCHMMA"],
        "int": ["IMAD.WIDE", "IMAD"],
        "loads": ["LDGSTS.E.BYPASS.128", "UTMALDG.2D"],
        "fp32": ["FFMA", "FMNMX3"],
        "other": [
            *(
                "MUFU.RCP",
                "HFMA2.MMA",
                "F2FP.F16.F32.PACK_AB",
                "IMAD.MOV.U32",
                "STG.E.128",
                "LDL.LU",
                "LDS",
                "LDGDEPBAR",
            ),
            *("UIADD3", "UMOV", "UTCBAR", "BRA"),
        ],
    }
    flat = [f"{opcode} R0" for each in opcodes.values() for opcode in each if opcode != "BRA"]
    loop = sections(from_listing(".L_x_0:", *flat, "@P0 BRA `(.L_x_0)", "EXIT")).loop
    assert loop == {name: len(each) for name, each in opcodes.items()}
