"""The cost model's arithmetic, from instruction counts to bounds: made-up counts, results checked by hand."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bra_triton.bench.machine_code import hardware
from bra_triton.bench.machine_code.cost_model import (
    Walk,
    predict,
    walk_of,
)
from bra_triton.bench.machine_code.hardware import (
    BLOCK_SHARED_BYTES,
    HARDWARE,
    Hardware,
    table_shared_bytes,
)
from bra_triton.bench.machine_code.launches import KERNEL_NAMES
from bra_triton.bench.machine_code.static_analysis import INSTRUCTION_CLASSES, Analysis, Usage
from bra_triton.bench.problems import MODELS, PROBLEMS, Problem

# A made-up GPU: one SM with round rates, and a clock of 1 Hz.
UNIT = Hardware("made up", 1, 1.0, 1.0, 64, 32, 64, 32, 100 << 10)
# Regions of 10 x 10 tokens, each of which chooses 4 of 64: a list of 400 keys. Two heads of 32 channels.
P3 = Problem("P3", 2, 80, 80, 64, 2, 8, 4)


def mix(**counts):
    return Counter({**dict.fromkeys(INSTRUCTION_CLASSES, 0), **counts})


def code(registers=128, shared=0, taps=None, n_taps=0):
    """Counts for tiles of 128 x 128 and 8 warps: 200 instructions in the loop over whole tiles, 90 in the
    loop over the tail (32 keys a step), 310 outside the loops."""
    return Analysis(
        mix(exp=64, matrix=10, fp32=126),
        mix(exp=16, matrix=4, fp32=70),
        taps or Counter(),
        mix(exp=2, fp32=308),
        False,
        *(128, 128, 32, n_taps, 8),
        Usage(registers, shared, 0, 0),
    )


def test_issue_slots_count_every_thread():
    assert code().slots_per_score == 200 * 8 * 32 / (128 * 128)


def walk(kernel, block_m, block_n, problem, block_tail=32, masked=False):
    tile = replace(code(), block_m=block_m, block_n=block_n, block_tail=block_tail)
    found = walk_of(kernel, tile, problem, masked)
    own, step = (block_n, block_m) if kernel == "key_value_gradient" else (block_m, block_n)
    assert found.scores == own * (step * found.whole_tiles + (block_tail or step) * found.tail_steps)
    return found.programs, found.whole_tiles, found.tail_steps


def test_walks():
    assert walk("attention_forward", 128, 128, P3) == (2 * 2 * 64, 3, 1)
    assert walk("query_gradient", 64, 80, P3) == (2 * 2 * 64 * 2, 5, 0)
    # The tail of 400 - 2 * 160 keys takes steps of 32 keys; without a loop for the tail, one step of 160.
    assert walk("attention_forward", 128, 160, P3) == (2 * 2 * 64, 2, 3)
    assert walk("attention_forward", 128, 160, P3, block_tail=0) == (2 * 2 * 64, 2, 1)
    # dK/dV owns keys and walks queries: on average 16 of the 49 query regions choose a region of 25 keys.
    pooled = Problem("", 1, 56, 56, 32, 1, 7, 16, kv_per_win=5)
    assert walk("key_value_gradient", 64, 16, pooled) == (49 * 2, 16, 0)
    # If every region attends to all regions, 8 x 12 queries, padding included, attend to 16 x 4 keys.
    all_chosen = Problem("", 1, 7, 10, 16, 1, 4, 16, kv_per_win=2)
    assert walk("attention_forward", 32, 32, all_chosen) == (3, 2, 0)
    assert walk("key_value_gradient", 32, 32, all_chosen) == (2, 3, 0)
    assert walk("attention_forward", 16, 32, replace(all_chosen, routing_weight="soft")) == (16, 2, 0)
    # Masked attention computes the scores of all 49 x 64 queries with all 49 x 25 keys.
    assert walk("attention_forward", 128, 64, pooled, masked=True) == (25, 19, 1)
    assert walk("key_value_gradient", 64, 128, pooled, masked=True) == (10, 49, 0)


def test_regions_that_are_padding_alone_walk_nothing():
    """7 x 7 regions of 2 x 2 tokens on a map of 10 x 10 tokens: only 25 regions hold a token of the map."""
    problem = Problem("", 1, 10, 10, 32, 1, 7, 16)
    tile = replace(code(), block_m=16, block_n=32, block_tail=16, num_warps=1)
    alive = 25 / 49
    assert walk_of("attention_forward", tile, problem)[:3] == (25, 2, 0)
    assert walk_of("small_map_forward", tile, problem)[:3] == (25, 2, 0)
    assert walk_of("key_value_gradient", replace(tile, block_n=16), problem)[:3] == (49, 4 * alive, 0)
    assert walk_of("small_map_backward", tile, problem)[:3] == (49, 2 * alive, 2 * alive)
    assert walk_of("attention_forward", tile, problem, masked=True)[:3] == (13, 6, 1)


def test_walks_of_a_small_map():
    """Regions of 4 x 4 tokens, each choosing 5 of 25; four of the eight heads for each program: a list of
    80 keys in steps of 32."""
    problem = Problem("", 2, 20, 20, 256, 8, 5, 5)
    tile = replace(code(), block_m=4 * 16, block_n=32, num_warps=4)
    forward, backward = (
        walk_of(kernel, tile, problem) for kernel in ("small_map_forward", "small_map_backward")
    )
    assert forward == Walk(2 * 25 * 2, 3, 0, 64 * 96)
    # `whole_tiles`: steps of the programs that own keys; `tail_steps`: of those that own queries.
    assert backward == Walk(2 * 25 * 2, 3, 3, 2 * 64 * 96)
    assert backward.programs * backward.scores >= problem.useful_scores
    cost = predict("small_map_backward", tile, problem, UNIT)
    assert cost.issue_slots == 100 * (310 + 3 * 200 + 3 * 90) * 4 * 32


def test_walks_of_a_small_map_with_fewer_keys_than_queries():
    """A region attends to 5 x 4 keys in one step, and 5 x 16 queries attend to its keys, in three steps."""
    problem = Problem("", 2, 20, 20, 256, 8, 5, 5, kv_per_win=2)
    tile = replace(code(), block_m=4 * 16, block_n=32, num_warps=4)
    assert walk_of("small_map_forward", tile, problem) == Walk(2 * 25 * 2, 1, 0, 64 * 32)
    assert walk_of("small_map_backward", tile, problem) == Walk(2 * 25 * 2, 3, 1, 64 * (96 + 32))
    cost = predict("small_map_backward", tile, problem, UNIT)
    assert cost.issue_slots == 100 * (310 + 3 * 200 + 1 * 90) * 4 * 32
    # Two products over 32 query channels in both loops; over 32 value channels two, and one in the tail.
    multiply_adds = 64 * (96 * (2 * 32 + 2 * 32) + 32 * (2 * 32 + 32))
    assert cost.bounds["matrix"] == pytest.approx(100 * multiply_adds / UNIT.half_fma)


def test_slots_count_every_section_as_often_as_it_runs():
    cost = predict("attention_forward", code(), P3, UNIT)
    # 8 warps execute 310 instructions once and 3 x 200 + 90 in the loops, for 100 x 400 scores.
    assert cost.slots_per_useful_score == pytest.approx((310 + 600 + 90) * 8 * 32 / (100 * 400))
    without_tail = predict("attention_forward", code(), replace(P3, topk=32), UNIT)
    assert without_tail.slots_per_useful_score == pytest.approx((310 + 25 * 200) * 256 / (100 * 3200))
    convolving = predict("attention_forward", code(taps=mix(fp32=40), n_taps=9), P3, UNIT)
    assert convolving.slots_per_useful_score == pytest.approx((1000 + 9 * 40) * 256 / (100 * 400))
    # Without a loop for the tail, the instructions for the tail are part of `rest`.
    bare = predict("attention_forward", replace(code(), tail=Counter()), P3, UNIT)
    assert bare.slots_per_useful_score == pytest.approx((310 + 600) * 256 / (100 * 400))


def test_bounds():
    cost = predict("attention_forward", code(), P3, UNIT)
    programs = 2 * 2 * 64
    scores = 128 * (3 * 128 + 32)
    assert cost.bounds == pytest.approx(
        {
            "issue": programs * 1000 * 256 / 128,
            "exponential": programs * (3 * 64 + 16 + 2) * 256 / 16,
            "matrix": programs * scores * (32 + 32) / 64,
        }
    )
    in_float32 = predict("attention_forward", code(), P3, UNIT, element_bytes=4)
    # A float32 product is three TF32 products, at half the rate.
    assert in_float32.bounds["matrix"] == pytest.approx(3 * 2 * cost.bounds["matrix"])


@pytest.mark.parametrize(
    ("change", "binding"),
    [
        ({"issue_slots": 1}, "issue"),
        ({"exponentials": 1, "half_fma": 1024}, "exponential"),
        ({"half_fma": 1}, "matrix"),
    ],
)
def test_the_slow_unit_binds(change, binding):
    bounds = predict("query_gradient", code(), P3, replace(UNIT, **change)).bounds
    assert max(bounds, key=bounds.get) == binding


def test_a_launch_takes_whole_programs_an_sm():
    one, many = (predict("attention_forward", code(), P3, replace(UNIT, sms=sms)) for sms in (256, 200))
    assert many.bounds["issue"] == 2 * one.bounds["issue"]  # 256 programs on 200 SMs: some take two


def test_what_does_not_fit_costs_infinitely():
    cost = predict("attention_forward", code(shared=100 << 10), P3, UNIT)
    assert cost.resident_warps == 0
    assert cost.cost == float("inf")


def test_products_of_each_kernel():
    wide = Problem("", 2, 80, 80, 80, 2, 8, 4, qk_dim=48)
    products = {
        "attention_forward": 32 + 64,
        "query_gradient": 2 * 32 + 64,
        "key_value_gradient": 2 * 32 + 2 * 64,
    }
    for kernel, each in products.items():
        walk = walk_of(kernel, code(), wide)
        matrix = predict(kernel, code(), wide, UNIT).bounds["matrix"]
        assert matrix == pytest.approx(walk.programs * walk.scores * each / UNIT.half_fma)


@given(
    kernel=st.sampled_from([*KERNEL_NAMES.values()]),
    sizes=st.tuples(*[st.integers(1, 8)] * 5),
    block_m=st.sampled_from([16, 32, 64, 128]),
    block_n=st.sampled_from([16, 32, 64, 128]),
    masked=st.booleans(),
)
def test_walks_cover_every_score(kernel, sizes, block_m, block_n, masked):
    batch, n_win, height, width, topk = sizes
    problem = Problem("", batch, n_win * height, n_win * width, 64, 2, n_win, min(topk, n_win**2))
    walk = walk_of(kernel, replace(code(), block_m=block_m, block_n=block_n), problem, masked)
    assert walk.programs * walk.scores >= problem.useful_scores


def test_resident_warps_by_each_limit():
    h100 = HARDWARE["sm_90"]
    assert h100.resident_warps(32, 0, 4) == 64  # the SM's own limit
    assert h100.resident_warps(128, 0, 8) == 16  # registers: 65536 / (128 x 32)
    assert h100.resident_warps(129, 0, 8) == 8  # rounded up to 136 a thread: 12 warps, one block of 8
    assert h100.resident_warps(100, 0, 1) == 16  # 4 in each quarter; an undivided SM would hold 19
    assert h100.resident_warps(32, 75 << 10, 4) == 12  # shared memory: 75 KiB and the system's 1 KiB a block
    assert h100.resident_warps(32, 0, 1) == 32  # at most 32 blocks
    assert h100.resident_warps(32, 228 << 10, 4) == 0


def test_a_table_serves_every_card_that_takes_its_tiles():
    assert table_shared_bytes("sm_80") == BLOCK_SHARED_BYTES["sm_86"] < BLOCK_SHARED_BYTES["sm_80"]
    assert table_shared_bytes("sm_90") == BLOCK_SHARED_BYTES["sm_90"] == 232448


class TestProblems:
    def test_models_are_sound(self):
        assert {name for name, problem in MODELS.items() if problem.grid.region_tokens >= 100} == {
            *("yolo_p3", "yolo_p3_head64", "high_resolution", "high_resolution_head64")
        }
        for name, problem in PROBLEMS.items():
            assert problem.name == name
            assert problem.topk <= problem.n_win**2
            assert problem.dim % problem.num_heads == 0

    def test_sizes_follow(self):
        p5 = PROBLEMS["yolo_p5"]
        assert (p5.grid.region_tokens, p5.grid.n_regions) == (9, 64)
        assert p5.useful_scores == 16 * 8 * 64 * 9 * 36

    def test_names_make_no_difference(self):
        assert replace(PROBLEMS["yolo_p3"], name="other") == PROBLEMS["yolo_p3"]


def test_tiles_of_an_architecture_are_limited_alike_before_its_table_is_made(monkeypatch):
    """The limit depends on the cards that use the architecture's tiles, not on which tables exist."""
    limits = {arch: table_shared_bytes(arch) for arch in hardware.HARDWARE}
    assert limits["sm_80"] == hardware.BLOCK_SHARED_BYTES["sm_86"]  # sm_86 uses these tiles
    monkeypatch.setattr(hardware, "packaged_archs", lambda: ("gfx942",))
    assert {arch: table_shared_bytes(arch) for arch in hardware.HARDWARE} == limits
