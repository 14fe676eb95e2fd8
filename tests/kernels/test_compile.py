"""Every kernel compiles for every GPU as it would be launched, and does not spill where that is checked."""

import dataclasses
import inspect
import re

import pytest
import torch

from bra_triton.bench.machine_code.hardware import BLOCK_SHARED_BYTES, table_shared_bytes
from bra_triton.bench.machine_code.launches import arguments_of, kernel_name, record_attention, variant
from bra_triton.bench.machine_code.static_analysis import compile_for, resource_usage
from bra_triton.bench.problems import PROBLEMS, Problem
from bra_triton.kernels import tiles
from bra_triton.kernels.arrays import Buffer, channels
from bra_triton.kernels.forms import ROUTED, use_form
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.routed import plan_attend_routed, plan_attend_routed_backward
from bra_triton.kernels.routing.launch import Routing, launch_route

pytestmark = pytest.mark.compiled

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SPILL_FREE = ("sm_80", "sm_90")
YOLO_P3 = dataclasses.replace(PROBLEMS["yolo_p3"], batch=2)
MODELS = {
    "yolo_p3": YOLO_P3,
    "biformer_stage1": dataclasses.replace(PROBLEMS["biformer_stage1"], batch=2),
}
PADDED = dataclasses.replace(YOLO_P3, height=79, width=78)
# Modes whose kernels differ from those of `MODELS`: by pointers that are None there, by strides or sizes.
MODES = {
    "padded_hard": dataclasses.replace(PADDED, routing_weight="hard"),
    "padded_soft": dataclasses.replace(PADDED, routing_weight="soft", side_dwconv=5),
    "pooled": dataclasses.replace(YOLO_P3, kv_per_win=4, side_dwconv=0),
    "unequal_heads": Problem("", 2, 80, 80, 96, 4, 8, 4, qk_dim=64),
    "masked": dataclasses.replace(PROBLEMS["biformer_stage3"], batch=2),
    "masked_padded": dataclasses.replace(PROBLEMS["biformer_stage3"], batch=2, height=13),
    "masked_pooled": dataclasses.replace(PROBLEMS["biformer_stage3"], batch=2, kv_per_win=1, side_dwconv=0),
    "whole": dataclasses.replace(YOLO_P3, topk=64),
    "whole_padded": dataclasses.replace(PADDED, topk=64),
}
_ROUTING_GRADIENT = {"query_routing_gradient", "key_routing_gradient", "spread_means"}
_LEPE, _ROUTING = {"lepe_backward"}, {"region_means", "route"}
# Kernels that a mode launches besides `KERNELS`, and kernels of `KERNELS` that it does not launch.
BESIDES = {
    "padded_hard": _ROUTING_GRADIENT,
    "padded_soft": _ROUTING_GRADIENT,
    "pooled": {"list_tokens"},  # queries and keys have different lists
    "masked_pooled": {"mark_choices"},
    "whole_padded": {"list_tokens"},
}
WITHOUT = {
    "pooled": _LEPE,
    "masked": {"invert_graph"},
    "masked_padded": {"invert_graph"},
    "masked_pooled": {"invert_graph", "finish_gradients", *_LEPE},
    "whole": {"invert_graph", *_ROUTING},
    "whole_padded": {"invert_graph", *_ROUTING},
}
# Maps of few tokens. One after the other, they have padding, a separate launch of the router, programs of a
# single head, wide heads, narrow heads, and pooled keys.
SMALL_MAPS = {
    "yolo_p5": dataclasses.replace(PROBLEMS["yolo_p5"], batch=2),
    "biformer_stage2": PROBLEMS["biformer_stage2"],
    "odd_heads": Problem("", 2, 20, 20, 96, 3, 5, 4),
    "head_64": Problem("", 2, 20, 20, 256, 4, 5, 4),
    "head_20": Problem("", 2, 20, 20, 80, 4, 5, 4, side_dwconv=5),
    "pooled": Problem("", 2, 20, 20, 128, 4, 5, 4, kv_per_win=2),
}
WIDE_HEADS = {
    "head_64": dataclasses.replace(PROBLEMS["yolo_p3_head64"], batch=2),
    "head_128": Problem("", 2, 20, 20, 256, 2, 4, 4),
    "head_256": Problem("", 2, 20, 20, 512, 2, 4, 4),
}
MANY_REGIONS = Problem("", 1, 140, 140, 64, 2, 70, 8)  # 4900, whose graph is inverted by way of coarser ones
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = {
    *("region_means", "route", "invert_graph", "attention_forward", "query_gradient"),
    *("key_value_gradient", "finish_gradients", "lepe_backward"),
}


def _for(arch, launch):
    """Adapts a launch, which has the architecture's tiles already, to the architecture: AMD has no TF32."""
    *numbers, config = launch.numbers
    if not arch.startswith("gfx") or not hasattr(config, "PRECISION"):
        return launch
    return dataclasses.replace(launch, numbers=(*numbers, config._replace(PRECISION="ieee")))


_usages = {}


def _usage(launch, arch):
    """Resource usage of a launch; kept, because most modes share the kernels around the attention."""
    key = (variant(launch), arch)
    if key not in _usages:
        _usages[key] = resource_usage(compile_for(_for(arch, launch), arch))
    return _usages[key]


def _check(problem, dtype, arch, expected=KERNELS, record=record_attention):
    with tiles.use_architecture(arch):
        launched = record(problem, dtype)
    # If the table's tile does not fuse LePE, there is also a launch of `lepe_forward`.
    assert {*map(kernel_name, launched)} - {"lepe_forward"} == expected
    for launch in launched:
        usage = _usage(launch, arch)
        assert usage.shared_bytes <= BLOCK_SHARED_BYTES[arch], launch.name
        if arch in SPILL_FREE:
            assert usage.spills == 0, (launch.name, usage)


@pytest.mark.parametrize(
    ("name", "arch", "dtype"),
    # bfloat16 differs from float16 only in the names of some instructions, so sm_90 is enough for it.
    [
        ("yolo_p3", arch, dtype)
        for arch in ARCHITECTURES
        for dtype in DTYPES
        if arch == "sm_90" or dtype == torch.float16
    ]
    + [("biformer_stage1", arch, torch.float16) for arch in SPILL_FREE]
    # Other cards of AMD: Instinct MI200, and Radeon RX 7900 and 9070, whose warps have 32 threads.
    + [("yolo_p3", arch, torch.float16) for arch in ("gfx90a", "gfx1100", "gfx1201")],
)
def test_kernels_compile_fit_and_do_not_spill(name, arch, dtype):
    _check(MODELS[name], dtype, arch)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        *((name, "sm_90") for name in MODES),
        ("padded_soft", "sm_80"),  # the mode that needs the most registers
        ("masked", "sm_80"),  # its router once spilled on sm_80
        ("padded_soft", "gfx942"),
        ("pooled", "gfx942"),
    ],
)
def test_every_mode_compiles_fits_and_does_not_spill(name, arch):
    _check(MODES[name], torch.float16, arch, KERNELS - WITHOUT.get(name, set()) | BESIDES.get(name, set()))


def _record_given(problem, dtype):
    """Launches of an attention to given regions, with one graph for each head."""
    packed = problem.attention(lambda *shape: torch.empty(shape, dtype=dtype, device="meta"))
    shape = (problem.batch, problem.num_heads, problem.grid.n_regions, problem.topk)
    r_idx = torch.empty(shape, dtype=torch.int32, device="meta")
    routed = dataclasses.replace(packed.routed(r_idx[:, 0]), r_idx=r_idx)
    forward = plan_attend_routed(routed)
    out = routed.value.contiguous()
    lse = out.new_empty(problem.batch, problem.num_heads, *out.shape[1:3], dtype=torch.float32)
    backward = plan_attend_routed_backward(routed, (out, out, lse))
    return [*forward.launches, *backward.launches]


def test_a_graph_for_each_head_compiles_fits_and_does_not_spill():
    expected = KERNELS - _LEPE - _ROUTING | {"list_tokens"}
    _check(YOLO_P3, torch.float16, "sm_90", expected, _record_given)


@pytest.mark.parametrize(
    ("name", "arch", "dtype"),
    [
        *((name, "sm_90", torch.float16) for name in SMALL_MAPS),
        *((name, "sm_80", torch.float16) for name in ("yolo_p5", "head_64")),
        ("yolo_p5", "sm_120", torch.float16),
        ("yolo_p5", "gfx942", torch.float16),
        ("yolo_p5", "gfx1100", torch.float16),
        ("yolo_p5", "sm_80", torch.float32),
        ("yolo_p5", "sm_90", torch.bfloat16),
    ],
)
def test_kernels_of_small_maps_compile_fit_and_do_not_spill(name, arch, dtype):
    problem = SMALL_MAPS[name]
    expected = {"region_means", "small_map_forward", "small_map_backward", "finish_gradients", *_LEPE}
    _check(problem, dtype, arch, expected | ({"route"} if name == "biformer_stage2" else set()))


@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    [
        ("head_64", torch.float16, "sm_80"),
        ("head_128", torch.float16, "sm_80"),
        ("head_256", torch.float16, "sm_90"),
        ("head_256", torch.float16, "gfx942"),
        ("head_64", torch.float32, "sm_90"),
        ("head_128", torch.float32, "sm_80"),  # on sm_90 dQ would spill with padding or weights
    ],
)
def test_wide_heads_fit_and_do_not_spill(name, dtype, arch):
    _check(WIDE_HEADS[name], dtype, arch)


@pytest.mark.parametrize(("head_dim", "arch"), [(5, "sm_80"), (5, "sm_90"), (20, "sm_90"), (200, "sm_90")])
def test_pieces_of_other_heads_are_summed_without_spills(head_dim, arch):
    """Narrow heads, whose tiles have one warp, and a wide head that is no power of two.

    The tests above sum pieces of heads of 24, 32, 64, 128 and 256, in tiles of two warps and more.
    """
    problem = Problem("", 2, 20, 20, 2 * head_dim, 2, 4, 4)
    with tiles.use_architecture(arch), use_form(ROUTED):
        launched = record_attention(problem, torch.float16)
    (finish,) = (launch for launch in launched if kernel_name(launch) == "finish_gradients")
    arguments = arguments_of(finish)
    assert arguments["SUMS"].HAS_PIECES
    assert arguments["QK_HEAD_DIM"] == head_dim
    assert _usage(finish, arch).spills == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_inverses_of_many_regions_do_not_spill(arch):
    """4900 regions take three inverses: 2 rows of 4096 regions, 77 of 64, and one row for each region.

    Only the rows of the last inverse are cut into pieces and listed.
    """
    with tiles.use_architecture(arch):
        launched = record_attention(MANY_REGIONS, torch.float16)
    inverses = [launch for launch in launched if kernel_name(launch) == "invert_graph"]
    assert [arguments_of(launch)["CONFIG"].SHIFT for launch in inverses] == [12, 6, 0]
    for launch in inverses:
        assert _usage(launch, arch).spills == 0, arguments_of(launch)["CONFIG"]


@pytest.mark.parametrize(
    ("n_regions", "topk"),
    # More than 256 regions are processed in steps or, with `topk` above 256, by one program a query region.
    [(1, 1), (100, 4), (256, 4), (400, 4), (400, 256), (600, 257)],
)
@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_routing_fits_every_card_of_an_architecture(n_regions, topk, arch):
    """The kernel takes the most shared memory at 256 regions.

    Cards of compute capability 8.6 and 8.9 have the tables of an A100 (8.0), but allow only 99 KiB.
    """
    means = torch.empty(2, n_regions, 128, device="meta")
    plan = Plan((means,), means.device)
    query, key = (channels(plan.given[0], start, start + 64) for start in (0, 64))
    r_weight, r_idx = (plan.output((2, n_regions, topk), dtype) for dtype in (torch.float32, torch.int32))
    launch_route(plan, Routing(query, key, r_weight, r_idx, 1.0))
    (launch,) = plan.launches
    usage = _usage(launch, arch)
    assert usage.spills == 0
    assert usage.shared_bytes <= table_shared_bytes(arch)


def test_the_check_sees_a_spill():
    """The same check on a tile that cannot fit the registers: it must fail."""
    too_large = dict.fromkeys(tiles.KERNELS, tiles.Tile(64, 64, 1, 1))
    with tiles.use_tiles(too_large), pytest.raises(AssertionError, match="spill"):
        _check(YOLO_P3, torch.float16, "sm_80")


@pytest.mark.parametrize("problem", [YOLO_P3, *MODES.values(), *SMALL_MAPS.values()])
def test_no_kernel_is_compiled_anew_for_a_size_that_divides_well(problem):
    """By default Triton compiles a kernel anew for a size of 1 and for multiples of 16."""
    for launch in record_attention(problem, torch.float16):
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=True):
            if parameter.is_constexpr:
                continue
            if isinstance(value, int):
                assert parameter.do_not_specialize, (launch.name, parameter.name)
            # `do_not_specialize` has no effect on the members of a group, so groups must not contain sizes.
            members = value if isinstance(value, tuple) else ()
            assert all(member is None or isinstance(member, Buffer) for member in members), launch.name


@pytest.mark.parametrize("problem", [YOLO_P3, *MODES.values(), *SMALL_MAPS.values(), MANY_REGIONS])
def test_no_kernel_asks_whether_a_group_is_none_if_one_of_its_members_is(problem):
    """Triton 3.4, which comes with PyTorch 2.8, cannot compile that. It is not installed here."""
    for launch in record_attention(problem, torch.float16):
        source = re.sub("#.*", "", inspect.getsource(launch.kernel.fn))
        for name, pointers in zip(launch.kernel.arg_names, launch.pointers, strict=False):
            if isinstance(pointers, tuple) and None in pointers:
                assert not re.search(rf"\b{name} is (not )?None", source), (launch.name, name)


@pytest.mark.parametrize("name", ["yolo_p3", "padded_soft"])
def test_ten_image_sizes_are_one_compilation(name):
    """Ultralytics trains with changing image sizes: here 512 x 576 to 768 x 896 pixels, at stride 8."""
    problem = (MODELS | MODES)[name]
    distinct = set()
    # Maps from 64 x 72 to 96 x 112 tokens. All of their regions, of 72 to 168 tokens, have the same tiles in
    # the table. With one token less along each side, every map needs padding.
    sizes = [(side, side + more) for side in range(64, 104, 8) for more in (8, 16)]
    assert len(sizes) == 10
    for height, width in sizes:
        odd = 0 if name == "yolo_p3" else 1
        sized = dataclasses.replace(problem, height=height - odd, width=width - odd)
        distinct |= {(launch.name, variant(launch)) for launch in record_attention(sized, torch.float16)}
    names = [name for name, _ in distinct]
    assert sorted(names) == sorted(set(names))
