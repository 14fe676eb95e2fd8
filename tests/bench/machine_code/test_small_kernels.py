"""What launches around the attention have to do, against what they do on the interpreter."""

from dataclasses import replace

import pytest
import torch
from traffic import Traffic, counted

from bra_triton.bench.machine_code.analysis import Analysis, analyse
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.launches import record, record_attention
from bra_triton.bench.machine_code.small_kernels import (
    WORK,
    Work,
    executed_instructions,
    predict_small,
    work_of,
)
from bra_triton.bench.machine_code.static_analysis import (
    INSTRUCTION_CLASSES,
    LoopMix,
    Usage,
    compile_for,
    sections,
)
from bra_triton.bench.presets import MODES, PRESETS
from bra_triton.kernels import tiles
from bra_triton.kernels.attention import launch as attention
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lepe import launch as lepe
from bra_triton.kernels.pooling import launch as pooling
from bra_triton.kernels.pooling.problem import MAX, MEAN, WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Gradients, Lepe, RoutedAttention
from bra_triton.kernels.routing import launch as routing
from bra_triton.kernels.routing import lists

WHOLE = RegionGrid.of_windows(8, 12, 2)
PADDED = RegionGrid.of_windows(7, 10, 4)  # a row and two columns of padding
GRIDS = {"whole": WHOLE, "padded": PADDED}
HALF = torch.float16  # so that elements of maps are smaller than those of means, sums and tables
# Of two blocks: 64 channels of means, 32 of LePE's values.
DIM = 36
BACKWARD_LISTS = {"list_tokens", "invert_graph", "cut_rows"}


def check(found: list[Traffic], expected: set[str]) -> None:
    assert {launch.kernel for launch in found} == expected
    for launch in found:
        work = work_of(launch.kernel, launch.grid, launch.arguments)
        assert (work.bytes_requested, work.bytes_moved) == (launch.requested, launch.moved), launch.kernel


def graph(grid: RegionGrid, topk: int, n_graphs: int = 1) -> torch.Tensor:
    """Every region chooses itself and those after it: rows of the inverse graph are alike, none is cut."""
    first = torch.arange(grid.n_regions)[:, None] + torch.arange(topk)
    return (first % grid.n_regions).int().expand(2, n_graphs, -1, -1).contiguous()


@pytest.mark.parametrize(
    ("grid", "counts_padding"), [(WHOLE, False), (PADDED, False), (PADDED, True)], ids=str
)
def test_routing(grid, counts_padding):
    """Channels of two blocks, and a third map of the packed projection that is not read."""
    qkv, scale, topk = torch.randn(2, grid.height, grid.width, 3 * DIM).to(HALF), 0.5, 3
    padding = torch.randn(3 * DIM).to(HALF) if counts_padding else None
    with counted() as found:
        query, key = routing.region_means(qkv, padding, grid, 2 * DIM).split(DIM, dim=-1)
        r_weight, _ = routing.route(query, key, topk, scale)
        routing.route_backward(r_weight, r_weight, graph(grid, topk)[:, 0], query, key, scale)
    check(found, {"region_means", "route", "invert_graph", "sum_over_pairs"})


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_lists(grid, masked, factor):
    r_idx = graph(grid, 3, n_graphs=2)
    query = torch.zeros(2, grid.height, grid.width, 2)
    weight = torch.rand(r_idx.shape) if factor else None
    problem = RoutedAttention(query, query, query, r_idx, grid, grid, 2, 1.0, weight)
    with counted() as found:
        lists.list_keys(problem, masked)
        lists.list_queries(problem, masked)
    check(found, {"list_tokens", "mark_choices"} if masked else BACKWARD_LISTS)


def test_pieces_of_rows_that_are_not_cut():
    """The kernel that sums them finds nothing to do."""
    maps = [torch.randn(2, WHOLE.height, WHOLE.width, 32) for _ in range(6)]
    problem = RoutedAttention(*maps[:3], graph(WHOLE, 3), WHOLE, WHOLE, 2, 1.0)
    out, _, lse = attention.attention_forward(problem)
    with counted() as found:
        attention.attention_backward(torch.ones_like(out), problem, out, lse, Gradients(*maps[3:]))
    check([launch for launch in found if launch.kernel in WORK], {*BACKWARD_LISTS, "sum_pieces"})


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("kernel", "needs_weight_grad"), [(3, True), (5, False)])
def test_lepe(grid, kernel, needs_weight_grad):
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(HALF)

    value = draw(2, grid.height, grid.width, 2 * DIM)[..., DIM:]
    fill = draw(DIM) if grid.is_padded else None
    bias = draw(DIM) if needs_weight_grad else None
    convolution = Lepe(value, draw(DIM, 1, kernel, kernel), bias, grid, fill)
    with counted() as found:
        out = lepe.lepe_forward(draw(2, grid.height, grid.width, DIM), convolution)
        lepe.lepe_backward(out, torch.zeros_like(value), convolution, needs_weight_grad)
    check(found, {"lepe_forward", "lepe_backward"})


def spans(count: int, size: int) -> torch.Tensor:
    start = torch.arange(count) * size
    return torch.stack([start, start + size], 1).int()


@pytest.mark.parametrize("mode", [MEAN, MAX, WEIGHTED])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_pooling(grid, mode):
    """Regions of 4 x 6 and 2 x 3 tokens, cells of half a region's rows and a third of its columns."""
    size = (grid.region_height // 2, grid.region_width // 3)
    channels = 68  # two blocks
    cells = RegionPooling(spans(2, size[0]), spans(3, size[1]), mode, grid)
    x = torch.randn(2, grid.height, grid.width, channels).to(HALF)
    weight, bias = torch.randn(channels, *size).to(HALF), torch.randn(channels).to(HALF)
    parameters = (weight, bias) if mode == WEIGHTED else (None, None)
    fill = torch.randn(channels).to(HALF) if grid.is_padded else None
    with counted() as found:
        pooled, argmax = pooling.pool_forward(x, fill, cells, *parameters)
        pooling.pool_backward(pooled, x, fill, argmax, cells, parameters[0], torch.empty_like(x))
    kernels = {"pool", "invert_cells", "pool_backward"}
    check(found, kernels | {"weight_gradient"} if mode == WEIGHTED else kernels)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel is 'attention_forward'; known are region_means, "):
        work_of("attention_forward", (1,), {})


# Between them every kernel but LePE's own forward.
PROBLEMS = ("yolo_p3_soft", "yolo_p3_conv", "biformer_stage3")


@pytest.mark.compiled
def test_the_loops_of_the_machine_code_are_those_of_the_source():
    """Or there would be no count of what a launch executes."""
    launches, arch = {}, "sm_90"
    with tiles.use_architecture(arch):
        for name in PROBLEMS:
            for launch in record_attention((PRESETS | MODES)[name].setting, torch.float16):
                if launch.specimen.name in WORK:
                    launches.setdefault((launch.specimen.name, repr(launch.specimen)), launch)
    assert {name for name, _ in launches} >= set(WORK) - {"lepe_forward"}
    for launch in launches.values():
        name = launch.specimen.name
        code, work = analyse(launch.specimen, arch), work_of(name, launch.grid, launch.arguments)
        executed = executed_instructions(code, work.turns)
        assert executed is not None, (name, work.turns, [loop.total for loop in code.loops])


@pytest.mark.compiled
def test_every_instruction_counts_once_where_a_loop_lies_in_another():
    row_start = torch.empty(2, 1, 65, dtype=torch.int32, device="meta")
    (launch,) = record(lambda: lists.cut_rows(row_start, 256))
    parts = sections(compile_for(launch.specimen, "sm_90"))
    outer, inner, _ = parts.loops
    assert (
        outer.counts["shuffles"] > 0 == inner.counts["shuffles"]
    )  # the sums over regions are the outer one's
    in_all = [mix.total for mix in (parts.taps, parts.rest) if mix is not None]
    assert parts.straight.total + sum(loop.total for loop in parts.loops) == sum(in_all)


@pytest.mark.compiled
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("n_regions", [1, 16, 100, 256, 300])
def test_the_loops_of_routing_whatever_its_tiles(n_regions, topk):
    """One program for all query regions up to one for each; of few turns the compiler may leave no loop."""
    if topk > n_regions:
        pytest.skip("no such choice")
    query, key = torch.empty(2, n_regions, 128, device="meta").split(64, dim=-1)
    (launch,) = record(lambda: routing.route(query, key, topk, 1.0))
    work = work_of("route", launch.grid, launch.arguments)
    assert executed_instructions(analyse(launch.specimen, "sm_80"), work.turns) is not None


def mix(fp32: int = 0, loads: int = 0) -> LoopMix:
    return LoopMix(dict.fromkeys(INSTRUCTION_CLASSES, 0) | {"fp32": fp32, "global_loads": loads}, {})


def code(*loops: LoopMix) -> Analysis:
    usage = Usage(32, 0, 0, 0, 0)
    return Analysis(0, 0, 0, 0, 4, usage, None, None, None, mix(), loops, straight=mix(fp32=1000))


def test_what_a_launch_executes():
    assert executed_instructions(code(), ()) == 1000
    assert executed_instructions(code(mix(fp32=10)), (7,)) == 1070
    assert executed_instructions(code(mix(fp32=10), mix(fp32=5)), (7, 3)) == 1085
    # Unrolled by four, and a loop for the rest.
    assert executed_instructions(code(mix(30, loads=4), mix(10, loads=1)), (7,)) == 1000 + 34 + 3 * 11
    # Two turns made straight code; of three there must be a loop.
    assert executed_instructions(code(mix(fp32=10)), (7, 2)) == 1070
    assert executed_instructions(code(mix(fp32=10)), (7, 3)) is None
    assert executed_instructions(code(mix(fp32=10), mix(fp32=5)), (7,)) is None


def test_bounds():
    """33 programs on 4 multiprocessors are 9 rounds of 4 warps; one region's means read all its tokens."""
    hardware = replace(HARDWARE["sm_80"], sms=4, clock=1.0, bandwidth=2.0)
    qkv = torch.empty(1, 4, 8, 32, dtype=HALF)
    sizes = {"region_height": 4, "region_width": 8, "height": 4, "width": 8, "n_regions": 1}
    arguments = {"qkv": qkv, "padding": None, **sizes, "MEAN_DIM": 16, "BLOCK_TOKENS": 8}
    cost = predict_small("region_means", code(mix(fp32=10)), (11, 3), arguments, hardware)
    moved = 32 * 16 * 2 + 16 * 4
    assert cost.work == Work((4,), moved, moved)
    assert cost.programs == 33
    assert cost.bounds == {"issue": 9 * 1040 * 4 * 32 / 128, "memory": moved / 2}
    assert cost.binding == "issue"
    assert cost.share_of_ideal == pytest.approx(moved / 2 / (9 * 1040))
    unknown = predict_small("region_means", code(), (11, 3), arguments, hardware)
    assert unknown.bounds == {"memory": moved / 2}
