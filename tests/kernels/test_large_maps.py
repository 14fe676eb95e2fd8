"""Maps of more than 2**31 elements: offsets that need more than 32 bits must be computed in 64.

In some tests a map is a slice of a very wide packed map, so that its few tokens lie far apart. In others
there are so many images that the last one lies far from the start of its array; only programs of the first
and last image run. Addresses are reserved for whole arrays, but only the pages that are used are touched.
"""

from dataclasses import replace

import attention_oracle
import far
import planned
import pytest
import torch
import triton
import triton.language as tl
from attention_parts import PARTS, Part, make
from interpreter import INTERPRETED, watch_overflows
from problems import relative_error, worst
from properties import needs_interpreter

from bra_triton.kernels import calls, forms, packed, routed, tiles
from bra_triton.kernels.attention.key_value_gradient import _load_statistics as load_statistics
from bra_triton.kernels.attention.launch import launch_finish
from bra_triton.kernels.forms import MASKED, ROUTED, SMALL_MAP, form_of, use_form
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lepe.arguments import LepeSums, LepeSumsConfig
from bra_triton.kernels.lepe.launch import LepeShares, launch_lepe, launch_lepe_gradient
from bra_triton.kernels.pooling.launch import MAX_STRIPS, plan_pool, plan_pool_backward, pooling_inputs
from bra_triton.kernels.pooling.problem import MAX, MEAN, WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Gradients, Lepe, Needs, PackedAttention, RoutedAttention, Settings
from bra_triton.kernels.routing.launch import launch_spread_means
from bra_triton.kernels.routing.lists import LONGEST_TO_MEAN
from bra_triton.kernels.small_map import launch as small_map

SIDE, ROW = 8, 2**25 + 2**22  # 64 tokens, the last at 2.38e9
GRID = RegionGrid.of_windows(SIDE, SIDE, 2)


@pytest.fixture(autouse=True)
def _no_integer_overflows():
    if INTERPRETED:
        watch_overflows(True)
        yield
        watch_overflows(False)
    else:
        yield


@pytest.fixture
def wide(device):
    """A function that copies a `(1, 8, 8, 16)` map into a packed map with rows of ROW float16 elements.

    The packed map takes 4.5 GiB of addresses.
    """

    def make(fill):
        try:
            packed = torch.empty(1, SIDE, SIDE, ROW, dtype=torch.float16, device=device)
        except RuntimeError:
            pytest.skip("no 4.5 GiB of addresses")
        part = packed[..., : fill.shape[-1]]
        part.copy_(fill)
        assert (SIDE * SIDE - 1) * ROW > 2**31
        return part

    return make


def test_attention_forward_and_backward(wide, device):
    maps = [torch.randn(1, SIDE, SIDE, 16, device=device).half() for _ in range(3)]
    r_idx = torch.tensor([[1, 3], [3, 0], [0, 1], [2, 3]], dtype=torch.int32, device=device)
    near = RoutedAttention(*maps, r_idx.view(1, 1, 4, 2), GRID, GRID, 1, 0.25)
    far = RoutedAttention(*(wide(x) for x in maps), near.r_idx, GRID, GRID, 1, 0.25)
    gradients = Gradients(*(wide(torch.zeros_like(x)) for x in maps))
    grad_out = torch.randn_like(maps[2])
    actual = attention_oracle.run_backend("triton", far, grad_out, targets=gradients)
    expected = attention_oracle.gradients(near, grad_out)
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    assert worst(errors.values()) < 4 * torch.finfo(torch.float16).eps, errors


def test_means_their_gradient_lepe_and_pooling(wide, device):
    x, attention_out = (torch.randn(1, SIDE, SIDE, 16, device=device).half() for _ in range(2))
    far = wide(x)
    packed = far.as_strided((1, SIDE, SIDE, ROW), far.stride())
    assert torch.equal(calls.region_means(packed, None, GRID, 16), calls.region_means(x, None, GRID, 16))
    weight = torch.randn(16, 1, 3, 3, device=device).half()
    outs = [torch.empty_like(x) for _ in range(2)]
    for out, v in zip(outs, (far, x), strict=True):
        planned.run(launch_lepe, attention_out, Lepe(v, weight, None, GRID), out)
    assert torch.equal(*outs)
    cells = torch.tensor([[0, 2], [2, 4]], dtype=torch.int32, device=device)
    description = RegionPooling(cells, cells, MAX, GRID)
    pooled = [calls.pool(v, None, description)[0] for v in (far, x)]
    assert torch.equal(*pooled)
    near_grad = torch.randn(1, SIDE, SIDE, 16, device=device).half()
    far_grad = wide(near_grad)
    grad_weights = [torch.empty_like(weight) for _ in range(2)]
    for grad, v, grad_weight in zip((far_grad, near_grad), (far, x), grad_weights, strict=True):
        gradients = LepeSums(grad_weight, None, None)
        lepe = Lepe(v, weight, None, GRID)
        planned.run(planned.lepe_gradient, attention_out, grad, lepe, gradients)
    assert torch.equal(far_grad, near_grad)
    assert torch.equal(*grad_weights)
    grad_means = torch.randn(1, GRID.n_regions, 16, device=device)
    packed_grad = far_grad.as_strided((1, SIDE, SIDE, ROW), far_grad.stride())
    for grad in (packed_grad, near_grad):
        planned.run(launch_spread_means, grad_means, grad, GRID, True)
    assert torch.equal(far_grad, near_grad)
    _, argmax = calls.pool(x, None, description)
    for grad, v in ((far_grad, far), (near_grad, x)):
        calls.pool_backward(pooled[1], v, None, argmax, description, None, grad)
    assert torch.equal(far_grad, near_grad)


# With so many images an array of six elements an image passes 2**31; five programs an image do not.
IMAGES = 4 * 10**8
TILES = dict.fromkeys(tiles.KERNELS, tiles.Tile(16, 16, 1, 1))


def _same_last_image(outputs, expected, images):
    """Compares the last image of every output that has an axis of images; the others are incomplete sums."""
    batched = [(x, y) for x, y in zip(outputs, expected, strict=True) if x.shape[:1] == (images,)]
    assert batched
    assert all(torch.equal(x[-1], y[0]) for x, y in batched)
    assert all(y.isfinite().all() for _, y in batched)


def _settings(grid, topk=3, **others):
    return Settings(16, 1, grid, topk, 0.25, 0.25, **others)


SOFT = {"routing_weight": "soft", "diff_routing": True}
PADDED = RegionGrid.of_windows(7, 7, 2)
# Form, settings, side of pooled regions; the comments name what the mode adds to the kernels.
FORMS = {
    "lists": (ROUTED, _settings(PADDED, **SOFT), None),  # padding, factors, the router's gradient
    "masked": (MASKED, _settings(GRID), None),
    "small map": (SMALL_MAP, _settings(PADDED, routing_weight="soft"), None),
    "pooled": (ROUTED, _settings(GRID), 2),  # lists that the router does not write
}


@needs_interpreter
@pytest.mark.parametrize("name", FORMS)
def test_the_last_of_many_images(name, monkeypatch):
    form, settings, pooled = FORMS[name]
    monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: form == MASKED)
    monkeypatch.setattr(small_map, "MOST_ROUTED", 2**40)  # programs of the last image choose, too
    if form == MASKED:
        monkeypatch.setattr(tiles, "MASKED_TILES", dict.fromkeys(tiles.KERNELS, tiles.Tile(64, 16, 1, 1)))
    grid, lepe = settings.grid, name != "pooled"
    dtype = torch.float16 if form == MASKED else torch.float32

    def random(*shape):
        return torch.randn(shape, dtype=dtype)

    near = PackedAttention(
        random(1, grid.height, grid.width, 48),
        random(1, grid.rows * pooled, grid.columns * pooled, 32) if pooled else None,
        random(48) if grid.is_padded else None,
        None,
        random(16, 1, 3, 3) if lepe else None,
        random(16) if lepe else None,
        settings,
    )
    grad_out = random(1, grid.height, grid.width, 16)
    images = IMAGES // 2 if form == SMALL_MAP else IMAGES  # its backward has eight programs an image
    distant = replace(near, qkv=far.far(near.qkv, images), kv=far.far(near.kv, images))
    needs = Needs(*(x is not None for x in near.tensors))
    results = []
    with tiles.use_tiles(TILES), use_form(None if form == MASKED else form):
        for problem, run in ((near, lambda plan, inputs: plan.run(*inputs)), (distant, far.run)):
            out, kept = run(packed.plan_attend(problem, True), problem.tensors)
            grad = grad_out if problem is near else far.far(grad_out, images)
            saved = (grad, out, kept)
            plan = packed.plan_attend_backward(problem, saved, needs)
            results.append([out, *run(plan, (*problem.tensors, *saved))])
    _same_last_image(results[1], results[0], images)


# All regions choose the last one, so its row of each inverse graph is the longest.
HEAD_GRAPHS = {
    "uncut": replace(PARTS["head_graphs"], factor=False, topk=3, all_choose=3),
    # Five pairs where the mean row has one. The pieces' partial sums lie far apart, too.
    "cut": Part("", RegionGrid.of_region_size(2, 10, (2, 2)), topk=1, head_graphs=True, all_choose=4),
}


@needs_interpreter
@pytest.mark.parametrize("row", HEAD_GRAPHS)
def test_the_last_image_of_a_graph_for_every_head(row):
    near = make(HEAD_GRAPHS[row], "cpu")
    lengths = torch.stack([graph.bincount() for graph in near.r_idx[0].flatten(1)])
    longest = LONGEST_TO_MEAN * near.topk * near.query_grid.n_regions // near.kv_grid.n_regions
    assert (lengths.max() > longest) == (row == "cut")
    # With more images a launch could have 2**31 programs.
    images = 2**31 // far.PROGRAMS
    grad_out = torch.randn_like(near.value)
    results = []
    with tiles.use_tiles(TILES):
        for run in (lambda plan, inputs: plan.run(*inputs), far.run):
            problem, grad = near, grad_out
            if run is far.run:
                maps = {n: far.far(getattr(near, n), images) for n in ("query", "key", "value", "r_idx")}
                problem, grad = replace(near, **maps), far.far(grad_out, images)
            out, lse = run(routed.plan_attend_routed(problem), problem.tensors)
            saved = (grad, out, lse)
            plan = routed.plan_attend_routed_backward(problem, saved)
            results.append([out, lse, *run(plan, (*problem.tensors, *saved))])
    assert form_of(near) == ROUTED
    _same_last_image(results[1], results[0], images)


@needs_interpreter
@pytest.mark.parametrize("mode", [MAX, MEAN, WEIGHTED])
def test_pooling_the_last_of_many_images(mode):
    x, fill = torch.randn(1, 7, 7, 16), torch.randn(16)
    weight, bias = (torch.randn(16, 2, 2), torch.randn(16)) if mode == WEIGHTED else (None, None)
    cells = torch.tensor([[0, 2], [2, 4]], dtype=torch.int32)
    pooling = RegionPooling(cells, cells, mode, PADDED)
    results, shares = [], []
    for run in (lambda plan, inputs: plan.run(*inputs), far.run):
        x_run = x if run is not far.run else far.far(x, IMAGES)
        inputs = pooling_inputs(x_run, fill, pooling, weight, bias)
        pooled, *argmax = run(plan_pool(inputs, pooling), inputs)
        grad_x = torch.zeros_like(x) if run is not far.run else far.far(torch.zeros_like(x), IMAGES)
        inputs = (*inputs, pooled, *(argmax or [None]), grad_x)
        shares.append(run(plan_pool_backward(inputs, pooling), inputs)[0])
        results.append([pooled, *argmax, grad_x])
    _same_last_image(results[1], results[0], IMAGES)
    assert torch.equal(shares[1][-len(shares[0]) :], shares[0])  # shares of the padding's gradient


@needs_interpreter
@pytest.mark.parametrize("mode", [MAX, MEAN])
def test_pooling_to_cells_of_very_many_channels(mode):
    """The last cells of a single image pass 2**31 elements."""
    dim, wide = 16, 2**28
    x, grad = torch.randn(1, SIDE, SIDE, dim).half(), torch.randn(1, 4, 4, dim).half()
    cells = torch.tensor([[0, 2], [2, 4]], dtype=torch.int32)
    pooling, results = RegionPooling(cells, cells, mode, GRID), []
    for channels in (dim, wide):
        maps = [far.reserve((1, side, side, channels), torch.float16) for side in (SIDE, 4, SIDE)]
        for part, near in zip(maps, (x, grad), strict=False):
            part[..., :dim] = near
        inputs = pooling_inputs(maps[0], None, pooling, None, None)
        pooled, *argmax = far.run(plan_pool(inputs, pooling), inputs, first_block=True)
        inputs = (*inputs, maps[1], *(argmax or [None]), maps[2])
        far.run(plan_pool_backward(inputs, pooling), inputs, first_block=True)
        results.append([result[..., :dim] for result in (pooled, maps[2])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][1].any()


@needs_interpreter
def test_shares_of_the_weight_of_pooling_that_lie_far_apart():
    """Shares of as many programs as possible, with so many channels that the last lie past 2**31 elements."""
    dim, wide = 64, 2**22
    x, grad_pooled, weight = torch.randn(1, 4, 4, dim), torch.randn(1, 2, 2, dim), torch.randn(dim, 2, 2)
    cells = torch.tensor([[0, 2]], dtype=torch.int32)
    pooling = RegionPooling(cells, cells, WEIGHTED, RegionGrid.of_windows(4, 4, 2))
    shares = []
    for images, channels in ((1, dim), (MAX_STRIPS, wide)):
        maps = [far.reserve((images, side, side, channels), torch.float32) for side in (4, 2)]
        for part, of_last in zip(maps, (x, grad_pooled), strict=True):
            part[-1, ..., :dim] = of_last[0]
        taps = far.reserve((channels, 2, 2), torch.float32)
        taps[:dim] = weight
        inputs = pooling_inputs(maps[0], None, pooling, taps, None)
        inputs = (*inputs, maps[1], None, maps[0])
        plan = plan_pool_backward(inputs, pooling)
        plan.launches = plan.launches[-1:]
        shares.append(far.run(plan, inputs, first_block=True)[0])
    assert shares[1].shape == (MAX_STRIPS, 4, wide)
    assert torch.equal(shares[1][-1, :, :dim], shares[0][0])


@needs_interpreter
def test_lepe_shares_of_the_last_of_many_images():
    """Every program of the backward writes shares; those of the last image lie far from the first."""
    parameters = torch.randn(16, 1, 3, 3), torch.randn(16)
    maps = torch.randn(3, 1, 7, 7, 16).unbind()
    shares = []
    for run in (lambda plan, inputs: plan.run(*inputs), far.run):
        inputs = (*(x if run is not far.run else far.far(x, IMAGES) for x in maps), *parameters)
        plan = planned.OpenPlan(inputs, torch.device("cpu"))
        value, grad_out, grad_value, weight, fill = plan.inputs
        lepe = Lepe(value, weight, None, PADDED, fill)
        launch_lepe_gradient(plan, grad_out, grad_value, lepe, LepeSums(weight, None, fill))
        shares.append(run(plan, inputs)[-1])
    assert torch.equal(shares[1][-len(shares[0]) :], shares[0])


@needs_interpreter
def test_the_sum_of_lepe_shares_that_lie_far_apart():
    """Shares of 512 programs, with so many channels that the last lie past 2**31 elements."""
    programs, rows, dim = 512, 10, 2**20
    shares = far.reserve((programs, rows, dim), torch.float32)
    shares[:, 0, :16] = torch.randn(programs, 16)
    weight = torch.zeros(dim, 9)
    plan = planned.OpenPlan((shares, weight), torch.device("cpu"))
    sums = LepeSums(plan.inputs[1], None, None)
    config = LepeSumsConfig(dim, 9, rows, True, 256, 16, HAS_PIECES=False)
    launch_finish(plan, None, LepeShares(plan.inputs[0], sums, config, 1))
    far.run(plan, (shares, weight), first_block=True)
    torch.testing.assert_close(weight[:16, 0], shares[:, 0, :16].sum(0))


@triton.jit
def statistics_kernel(statistics, lse, delta, first, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    found = load_statistics(statistics, first + index, None)
    tl.store(lse + index, found[0])
    tl.store(delta + index, found[1])


@needs_interpreter
def test_statistics_of_a_map_of_more_than_a_billion_tokens():
    """Statistics are two numbers a token, so they pass 2**31 numbers at 2**30 tokens."""
    statistics = far.reserve((2**30 + 16, 2), torch.float32)
    statistics[-16:] = torch.randn(16, 2)
    found = torch.empty(2, 16)
    with far.programs_from(0):
        statistics_kernel[(1,)](statistics, *found, 2**30, 16)
    assert torch.equal(found, statistics[-16:].T)
