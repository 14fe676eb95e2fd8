"""Every kernel compiles for every GPU as it would be launched, and spills nothing where that is checked."""

import dataclasses

import pytest
import torch

from bra_triton.bench.launches import record_attention
from bra_triton.bench.static_analysis import compile_for, resource_usage
from bra_triton.kernels import tiles
from bra_triton.kernels.launch import Problem

pytestmark = pytest.mark.compiled

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SPILL_FREE = ("sm_80", "sm_90")
# Dynamic shared memory that a thread block may ask for.
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
PROBLEMS = {
    "biformer_stage2": Problem(2, 4, 4, 7, 4, 4, 32, 32, 128**-0.5),
    "yolo_p3": Problem(2, 10, 10, 8, 4, 2, 32, 32, 64**-0.5),
}
WIDE_HEADS = {
    "head_64": Problem(2, 10, 10, 8, 4, 2, 64, 64, 128**-0.5),
    "head_128": Problem(2, 5, 5, 4, 4, 2, 128, 128, 256**-0.5),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = {
    *("region_means", "route", "invert_graph"),
    *("attention_forward", "query_gradient", "key_value_gradient"),
}


def _for(arch, specimen):
    """What a launch on that architecture would change: AMD has no TF32, and takes no second stage."""
    if not arch.startswith("gfx") or "PRECISION" not in specimen.constexprs:
        return specimen
    constexprs = {**specimen.constexprs, "PRECISION": "ieee"}
    return dataclasses.replace(specimen, constexprs=constexprs, num_stages=1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_compile_fit_and_do_not_spill(name, dtype, arch):
    specimens = record_attention(PROBLEMS[name], dtype)
    assert {specimen.name for specimen in specimens} == KERNELS
    for specimen in specimens:
        compiled = compile_for(_for(arch, specimen), arch)
        usage = resource_usage(compiled)
        assert usage.shared_bytes <= SHARED_BYTES[arch], specimen.name
        if arch in SPILL_FREE:
            assert usage.spill_loads == usage.spill_stores == 0, (specimen.name, usage)


@pytest.mark.parametrize("arch", ["sm_80", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", WIDE_HEADS)
def test_wide_heads_in_half_precision_fit_and_do_not_spill(name, arch):
    for specimen in record_attention(WIDE_HEADS[name], torch.float16):
        usage = resource_usage(compile_for(_for(arch, specimen), arch))
        assert usage.shared_bytes <= SHARED_BYTES[arch], specimen.name
        if arch in SPILL_FREE:
            assert usage.spill_loads == usage.spill_stores == 0, (specimen.name, usage)


def test_the_check_sees_a_spill(monkeypatch):
    """The same check on a tile that cannot fit the registers: it must fail."""
    monkeypatch.setattr(tiles, "choose", lambda *arguments: tiles.Tile(128, 128, 1, 1))
    specimen = next(
        s for s in record_attention(PROBLEMS["yolo_p3"], torch.float16) if s.name == "key_value_gradient"
    )
    usage = resource_usage(compile_for(specimen, "sm_80"))
    assert usage.spill_loads > 0
    assert usage.spill_stores > 0


def test_no_kernel_is_compiled_anew_for_a_size_that_divides_well():
    """Triton would compile apart for sizes of 1 and multiples of 16."""
    for specimen in record_attention(PROBLEMS["yolo_p3"], torch.float16):
        sizes = [p for p in specimen.kernel.params if p.name in ("region_height", "region_width")]
        assert all(size.do_not_specialize for size in sizes), specimen.name
        assert sizes or specimen.name in ("route", "invert_graph")


def test_sizes_are_no_compile_time_numbers():
    """Ultralytics trains with changing image sizes: another region size must not compile anew."""
    small, large = (
        dataclasses.replace(PROBLEMS["yolo_p3"], region_height=side, region_width=side + 1)
        for side in (10, 16)
    )
    for a, b in zip(
        record_attention(small, torch.float16), record_attention(large, torch.float16), strict=True
    ):
        assert (a.signature, a.constexprs, a.num_warps) == (b.signature, b.constexprs, b.num_warps)
