"""What is compiled for the report is what a launch on such a GPU compiles."""

import pytest
import torch

from bra_triton.bench import stand_in
from bra_triton.bench.machine_code.launches import launches_of, record_attention
from bra_triton.bench.machine_code.static_analysis import compile_for
from bra_triton.bench.problems import PROBLEMS, Problem
from bra_triton.kernels.packed import plan_attend
from bra_triton.kernels.problem import PackedAttention

# Keys and values start at 8 and 16 bytes: only the latter can be loaded 16 bytes at a time.
NARROW = Problem("", 1, 4, 4, 4, 1, 2, 2, side_dwconv=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
def test_interpreted_kernels_are_refused():
    with pytest.raises(TypeError, match="is not compiled; is TRITON_INTERPRET set"):
        record_attention(PROBLEMS["tiny"], torch.float16)


@pytest.mark.compiled
def test_a_specimen_compiles_to_what_triton_itself_compiles_for_the_launch():
    settings = NARROW.settings
    qkv = torch.empty(1, 4, 4, 12, dtype=torch.float16)
    plan = plan_attend(PackedAttention(qkv, None, None, None, None, None, settings), trains=False)
    with stand_in.without_gpu():
        theirs = [x.kernel.warmup(*x.arguments, grid=x.grid, **x.options) for x in plan.launches]
    for launch, compiled in zip(launches_of(plan), theirs, strict=True):
        ours = compile_for(launch.specimen, stand_in.ARCH)
        assert ours.asm["ptx"] == compiled.asm["ptx"], launch.specimen.name
    forward = launches_of(plan)[-1].specimen
    assert forward.divisible >= {"maps.query", "maps.value"}
    assert "maps.key" not in forward.divisible
