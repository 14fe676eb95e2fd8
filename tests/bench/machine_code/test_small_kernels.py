"""What launches around the attention have to do, against what they do on the interpreter."""

import pytest
import torch
from traffic import Traffic, counted

from bra_triton.bench.machine_code.analysis import analyse
from bra_triton.bench.machine_code.cost_model import ATTENTION_KERNELS
from bra_triton.bench.machine_code.hardware import HARDWARE
from bra_triton.bench.machine_code.launches import record_attention
from bra_triton.bench.machine_code.small_kernels import (
    WORK,
    executed_instructions,
    predict_small,
    work_of,
)
from bra_triton.bench.presets import MODES, PRESETS
from bra_triton.kernels import tiles
from bra_triton.kernels.launches import lepe, lists, pooling, routing
from bra_triton.kernels.pooling_problem import MAX, MEAN, WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Lepe, RoutedAttention
from bra_triton.kernels.region_grid import RegionGrid

WHOLE = RegionGrid.of_windows(8, 12, 2)
PADDED = RegionGrid.of_windows(7, 10, 4)  # a row and two columns of padding
GRIDS = {"whole": WHOLE, "padded": PADDED}
HALF = torch.float16  # so that elements of maps are smaller than those of means, sums and tables
# Of two blocks: 64 channels of means, 32 of LePE's values.
DIM = 36


def check(found: list[Traffic], expected: set[str]) -> None:
    assert {launch.kernel for launch in found} == expected
    for launch in found:
        work = work_of(launch.kernel, launch.grid, launch.arguments)
        assert (work.bytes_requested, work.bytes_moved) == (launch.requested, launch.moved), launch.kernel


def graph(grid: RegionGrid, topk: int, n_graphs: int = 1) -> torch.Tensor:
    """Every region chooses itself and those after it: rows of the inverse graph are alike, none is cut."""
    first = torch.arange(grid.n_regions)[:, None] + torch.arange(topk)
    return (first % grid.n_regions).int().expand(2, n_graphs, -1, -1).contiguous()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("counts_padding", [False, True])
def test_routing(grid, counts_padding):
    """Channels of two blocks, and a third map of the packed projection that is not read."""
    qkv, scale, topk = torch.randn(2, grid.height, grid.width, 3 * DIM).to(HALF), 0.5, 3
    padding = torch.randn(3 * DIM).to(HALF) if counts_padding and grid.is_padded else None
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
    check(found, {"list_tokens", "mark_choices"} if masked else {"list_tokens", "invert_graph", "cut_rows"})


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


PROBLEMS = {
    name: (PRESETS | MODES)[name]
    for name in ("yolo_p3", "yolo_p5", "biformer_stage1", "biformer_stage3", *MODES)
}


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_loops_of_the_machine_code_are_those_of_the_source(arch):
    """Or there would be no count of what a launch executes. Every kernel but LePE's own forward occurs."""
    launches = {}
    with tiles.use_architecture(arch):
        for problem in PROBLEMS.values():
            for launch in record_attention(problem.setting, torch.float16):
                if launch.specimen.name in WORK:
                    launches.setdefault((launch.specimen.name, repr(launch.specimen)), launch)
    assert {name for name, _ in launches} >= set(WORK) - {"lepe_forward"}
    for launch in launches.values():
        name = launch.specimen.name
        code, work = analyse(launch.specimen, arch), work_of(name, launch.grid, launch.arguments)
        executed = executed_instructions(code, work.trips)
        assert executed is not None, (name, work.trips, [loop.total for loop in code.loops])
        assert executed >= code.straight.total


@pytest.mark.compiled
def test_what_a_launch_executes():
    """Twice the tokens of a region are twice the turns of the loop over them, and nothing else."""
    launch = next(iter(record_attention(PRESETS["yolo_p3"].setting, torch.float16)))
    code = analyse(launch.specimen, "sm_90")
    (loop,) = code.loops
    once, twice = (executed_instructions(code, (turns,)) for turns in (4, 8))
    assert twice - once == 4 * loop.total > 0
    assert once == code.straight.total + 4 * loop.total
    assert executed_instructions(code, (4, 4)) is None
    cost = predict_small("region_means", code, launch.grid, launch.arguments, HARDWARE["sm_90"])
    assert cost.programs == 16 * 64 * 2
    assert cost.binding in ("issue", "memory")
    assert "region_means" not in ATTENTION_KERNELS
