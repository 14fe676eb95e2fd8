"""Every kernel compiles for every GPU as it would be launched, and spills nothing where that is checked."""

import dataclasses

import pytest
import torch

from bra_triton.bench.launches import record_attention
from bra_triton.bench.static_analysis import compile_for, resource_usage
from bra_triton.kernels import Problem, tiles

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
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = {
    *("region_means", "route", "invert_graph"),
    *("attention_forward", "query_gradient", "key_value_gradient"),
}


def _for(arch, specimen):
    """What a launch on that architecture would change: AMD has no three-product float32."""
    if arch.startswith("gfx") and specimen.constexprs.get("PRECISION") == "tf32x3":
        return dataclasses.replace(specimen, constexprs={**specimen.constexprs, "PRECISION": "ieee"})
    return specimen


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


def test_the_check_sees_a_spill(monkeypatch):
    """The same check on a tile that cannot fit the registers: it must fail."""
    monkeypatch.setattr(tiles, "choose", lambda *arguments: tiles.Tile(128, 128, 1, 1))
    specimen = next(
        s for s in record_attention(PROBLEMS["yolo_p3"], torch.float16) if s.name == "key_value_gradient"
    )
    usage = resource_usage(compile_for(specimen, "sm_80"))
    assert usage.spill_loads > 0
    assert usage.spill_stores > 0


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
