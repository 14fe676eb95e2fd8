"""The kernel report compiles the same code as a launch on a GPU of that architecture."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from triton import knobs

from bra_triton.bench import stand_in
from bra_triton.bench.machine_code.launches import bytes_of_arguments, record_attention, variant
from bra_triton.bench.machine_code.static_analysis import compile_for
from bra_triton.bench.problems import PROBLEMS, Problem
from bra_triton.kernels.packed import plan_attend
from bra_triton.kernels.plan import Plan

# In float16 keys start at byte 8 and values at byte 16: Triton assumes 16-byte alignment for values only.
NARROW = Problem("", 1, 4, 4, 4, 1, 2, 2, side_dwconv=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
def test_interpreted_kernels_are_refused():
    launch = record_attention(PROBLEMS["tiny"], torch.float16)[0]
    with pytest.raises(TypeError, match="is TRITON_INTERPRET set"):
        compile_for(launch, "sm_90")


def test_a_launch_moves_what_its_arrays_hold():
    """A packed projection of 4 x 4 tokens and 12 channels in float16, and the float32 means of 8 of these
    channels in 4 regions."""
    means = record_attention(NARROW, torch.float16)[0]
    assert bytes_of_arguments(means) == 16 * 12 * 2 + 4 * 8 * 4


@pytest.mark.compiled
def test_launches_with_tensors_find_what_was_compiled_for_them(tmp_path):
    """Every launch hits Triton's cache on disk, which `compile_for` has filled: all options are the same."""
    plan, tensors = _forward(NARROW, "cpu")
    hits = []
    with knobs.cache.scope(), knobs.compilation.scope(), stand_in.without_gpu():
        knobs.cache.dir = str(tmp_path)
        for launch in plan.launches:
            launch.kernel.device_caches.clear()
            compile_for(launch, stand_in.ARCH)
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        plan.run(*tensors)
    assert hits == [True] * len(plan.launches)


@pytest.mark.compiled
def test_variants_are_what_triton_compiles_apart():
    """Another batch size is the same variant; an array that is not 16-byte aligned, or of another dtype, is
    another variant."""
    first, larger = (_forward(replace(NARROW, batch=n))[0].launches[0] for n in (1, 16))
    (qkv, *others) = first.pointers
    launches = [
        first,
        larger,
        replace(first, pointers=(replace(qkv, offset=2), *others)),
        replace(first, pointers=(replace(qkv, dtype=torch.float32), *others)),
    ]
    with stand_in.driver_of("sm_90", device="sm_90"):
        codes = [each.kernel.warmup(*each.arguments, grid=each.grid, **each.options) for each in launches]
    found = [variant(launch) for launch in launches]
    assert [a == b for a, b in combinations(found, 2)] == [a is b for a, b in combinations(codes, 2)]
    assert len({*found}) == 3


def _forward(problem: Problem, device: str = "meta") -> tuple[Plan, tuple[torch.Tensor | None, ...]]:
    attention = problem.attention(lambda *shape: torch.empty(shape, dtype=torch.float16, device=device))
    return plan_attend(attention, trains=False), attention.tensors
