"""The torch backend's path for GPUs, on the CPU: stand-ins take the place of PyTorch's kernels for NVIDIA.

`tests/gpu/test_torch_backend.py` runs the kernels themselves, where there is a GPU.
"""

import inspect
from dataclasses import replace

import pretended
import pytest
import torch
import torch.nn.functional as F
from attention_parts import PARTS, compare, make
from modules import reference_of, run
from problems import relative_error, worst

from bra_triton import BiLevelRoutingAttention
from bra_triton.backend import torch as torch_backend
from bra_triton.backend.torch import chunks, devices, efficient, lepe, sums
from bra_triton.bench.problems import MODELS
from bra_triton.kernels.problem import Needs

FLOAT32_TOLERANCE = 5e-6  # as in test_routed_attention


@pytest.fixture
def nvidia():
    with pretended.nvidia() as calls:
        yield calls


@pytest.mark.parametrize("stand_in", [pretended.efficient_forward, pretended.efficient_backward])
def test_stand_ins_have_the_schemas_of_pytorch(stand_in):
    schema = getattr(torch.ops.aten, f"_{stand_in.__name__.replace('_', '_attention_')}").default._schema
    parameters = inspect.signature(stand_in).parameters.values()
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        assert parameter.name == argument.name.removesuffix("_")
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only


@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("name", PARTS)
def test_output_and_all_gradients(name, most, nvidia, monkeypatch):
    """In one chunk, and in chunks of one region and of three, whose sums are added up."""
    if most:
        monkeypatch.setattr(chunks, "regions_at_once", lambda *args, **kwargs: most)
    part = PARTS[name]
    errors = compare("torch", make(part, "cpu"), part.needs_factor)
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors
    fused = {head_dim * 4 % 16 for head_dim in part.head_dims} == {0}
    assert set(nvidia) == ({"efficient_forward", "efficient_backward"} if fused else set())


def test_heads_at_odd_addresses_are_copied(nvidia):
    """The maps start 4 bytes past a multiple of 16, but PyTorch's kernels load 16 bytes at once."""
    problem = make(PARTS["whole_16"], "cpu")
    maps = (torch.empty(x.numel() + 1)[1:].view(x.shape) for x in (problem.query, problem.key, problem.value))
    problem = replace(problem, **dict(zip(("query", "key", "value"), maps, strict=True)))
    for x in (problem.query, problem.key, problem.value):
        x.normal_()
    assert problem.query.data_ptr() % 16
    assert worst(compare("torch", problem, False).values()) < FLOAT32_TOLERANCE


def test_a_denominator_of_one_is_no_missing_softmax(nvidia):
    """With one key of score 0 lse is 0. PyTorch's kernel also gives 0 if all scores are minus infinity."""
    zeros, ones = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    out, lse = chunks.EFFICIENT.forward(zeros, zeros, ones, 1.0)
    assert (out == 1).all()
    assert (lse == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bags_add_up_in_a_fixed_order(dtype):
    index = torch.tensor([5, 3, 3, 7, 5, 3], dtype=torch.int32)
    bags = sums.Bags.of(index, range(3, 8))
    assert bags.choices.tolist() == [1, 2, 5, 0, 4, 3]
    assert bags.starts.tolist() == [0, 3, 3, 5, 5]
    rows, weight = torch.randn(6, 4).to(dtype), torch.rand(6)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected.index_add_(0, index - 3, rows.double() * weight[:, None].to(dtype))
    actual = bags.sums(rows, weight)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= torch.finfo(dtype).eps
    shared = bags.sums(rows[:3], None, topk=2)
    assert torch.equal(shared, bags.sums(rows[:3].repeat_interleave(2, 0), None))


def _routed(problem, dtype):
    packed = problem.attention(lambda *sizes: torch.empty(sizes, dtype=dtype, device="meta"))
    shape = (problem.batch, problem.grid.n_regions, problem.topk)
    return packed.routed(torch.empty(shape, dtype=torch.int32, device="meta"))


def test_chunks_are_of_a_size_in_bytes(monkeypatch):
    """P3 in float16: each of 64 regions an image gathers 400 keys and values of 64 channels, 102400 bytes."""
    p3 = MODELS["yolo_p3"]
    problem, gathered = _routed(replace(p3, batch=8), torch.float16), 102400
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300 * gathered)
    monkeypatch.setattr(devices, "kind", lambda x: "cuda")
    assert chunks.regions_at_once(problem, chunks.EFFICIENT) == 300
    # The backward also has gradients of this size, and for each head two float32 tiles of 64 x 64.
    needed = 2 * gathered + 2 * 2 * 64 * 64 * 4
    assert chunks.regions_at_once(problem, chunks.EFFICIENT, backward=True) == 300 * gathered // needed
    # A chunk may take as much as the maps if these are larger: 6400 tokens of 192 channels an image.
    large = _routed(replace(p3, batch=64), torch.float16)
    assert chunks.regions_at_once(large, chunks.EFFICIENT) == 64 * 6400 * 192 * 2 // gathered
    # On other devices: keys and values twice, scores in float32 and probabilities in float16.
    for kind in ("mps", "xpu", "hip"):
        monkeypatch.setattr(devices, "kind", lambda x, kind=kind: kind)
        needed = 2 * gathered + 2 * 100 * 400 * 6
        assert chunks.regions_at_once(problem, chunks.PRODUCTS) == 300 * gathered // needed
    # The launch grid has room for 65535 regions.
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**60)
    assert chunks.regions_at_once(problem, chunks.EFFICIENT) == 2**16 - 1
    monkeypatch.setattr(devices, "kind", lambda x: "cpu")
    assert chunks.regions_at_once(problem, chunks.FLASH) == 2 * chunks.CHUNK_ELEMENTS // (gathered // 2)


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ((8, 1, 8, 8), 512, [512]),
        ((8, 1, 8, 8), 511, [256, 256]),  # P3's backward: parts of 7 images and of 1 would take more memory
        ((2, 3, 5, 4), 13, [12, 8] * 6),  # rows
        ((1, 1, 2, 5), 3, [3, 2] * 2),  # columns
        ((1, 1, 1, 3), 0, [1] * 3),  # not even one region fits
        ((0, 1, 8, 8), 512, []),
    ],
)
def test_boxes_are_few_and_even(sizes, most, expected):
    times = torch.zeros(sizes)
    boxes = list(chunks.boxes(sizes, most))
    for box in boxes:
        times[box] += 1
    assert [times[box].numel() for box in boxes] == expected
    assert (times == 1).all()


def test_scores_of_one_large_region_are_cut(nvidia, monkeypatch):
    """Scores of 2 heads, 10 queries and 6 keys, in float32 and float16; the backward holds twice as many."""
    rows, key = torch.empty(1, 2, 10, 4).half(), torch.empty(1, 2, 6, 4).half()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 10 * 6 * (4 + 2))
    assert len(chunks._split(rows, key)) == 1
    assert [part.shape[2] for part in chunks._split(rows, key, backward=True)] == [5, 5]


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dims", "expected"),
    [
        ("cuda", torch.float16, (32, 32), chunks.EFFICIENT),
        ("cuda", torch.float32, (4, 20), chunks.EFFICIENT),
        ("cuda", torch.float16, (4, 32), chunks.PRODUCTS),  # 8 bytes a head
        ("cuda", torch.float32, (32, 5), chunks.PRODUCTS),
        ("cuda", torch.float64, (32, 32), chunks.PRODUCTS),
        ("hip", torch.float16, (32, 32), chunks.PRODUCTS),
        ("mps", torch.float32, (32, 32), chunks.PRODUCTS),
        ("cpu", torch.float32, (32, 32), chunks.FLASH),
        ("cpu", torch.float32, (32, 16), chunks.PRODUCTS),
    ],
)
def test_the_kernel_that_serves(kind, dtype, head_dims, expected, nvidia, monkeypatch):
    monkeypatch.setattr(devices, "kind", lambda x: kind)
    assert chunks.kernel_for(torch.empty(1, dtype=dtype), *head_dims) is expected


def test_pytorchs_own_switch_is_heeded(nvidia, monkeypatch):
    monkeypatch.setattr(efficient, "can_use_efficient_attention", lambda params: False)
    assert chunks.kernel_for(torch.empty(1), 32, 32) is chunks.PRODUCTS


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gradients_of_the_convolution(dtype, wanted, nvidia):
    grad, x = (torch.randn(2, 6, 5, 4).to(dtype) for _ in range(2))
    weight = torch.randn(6, 1, 3, 3).to(dtype)
    inputs = [each.double().requires_grad_() for each in (x, weight, torch.zeros(6))]
    out = F.conv2d(*inputs, padding=1, groups=6)
    expected = torch.autograd.grad(out, inputs, grad.double())
    actual = lepe._derive_on_nvidia(grad, x, weight, wanted)
    assert [each is not None for each in actual] == [True, *wanted]
    for each, truth in zip(actual, expected, strict=True):
        assert each is None or relative_error(each, truth) < 1e-6


@pytest.mark.parametrize(
    ("batch", "dim", "most", "depthwise", "by_taps"),
    [
        (2, 6, 2**31, True, False),
        (0, 6, 2**31, False, False),  # PyTorch's own kernel takes no empty map
        (2, 6, 200, False, True),  # its kernels count elements in 32 bits, here up to 200
        (2, 1, 2**31, True, True),  # for one channel PyTorch calls cuDNN
    ],
)
def test_the_convolution_that_serves(batch, dim, most, depthwise, by_taps, nvidia, monkeypatch):
    taps, derive_by_taps = [], lepe.derive_by_taps
    monkeypatch.setattr(lepe, "derive_by_taps", lambda *given: taps.append(1) or derive_by_taps(*given))
    monkeypatch.setattr(lepe, "_INDEXED_BY_32_BITS", most)
    grad, x = torch.randn(2, batch, dim, 5, 4)
    lepe._derive_on_nvidia(grad, x, torch.randn(dim, 1, 3, 3), (True, True))
    assert ("depthwise" in nvidia, bool(taps)) == (depthwise, by_taps)


@pytest.mark.parametrize("mode", ["identity", "ada_avgpool", "ada_maxpool", "maxpool", "fracpool", "conv"])
def test_modules_are_right_and_never_wait(mode, nvidia):
    """Keys pooled or padded, routing weights that learn and LePE, in float32."""
    module = BiLevelRoutingAttention(
        16,
        num_heads=2,
        n_win=3,
        topk=4,
        auto_pad=True,
        soft_routing=True,
        diff_routing=True,
        kv_downsample_mode=mode,
        kv_per_win=2,
        kv_downsample_ratio=2,
        backend="torch",
    ).eval()
    x, grad_out = torch.randn(2, 11, 10, 16), torch.randn(2, 11, 10, 16)
    expected = run(reference_of(module), x.double(), grad_out)
    with pretended.no_waits():
        actual = run(module, x, grad_out)
    least = 1e-3 * expected["x"].norm()  # a bias of the keys hardly changes the softmax
    errors = {
        key: relative_error(actual[key], value) for key, value in expected.items() if value.norm() > least
    }
    assert worst(errors.values()) < FLOAT32_TOLERANCE, errors


# The most launches of forward and backward. Each takes at least 2 us of the GPU's time and 5 us of the CPU's.
LAUNCHES = {"yolo_p4": (19, 16), "biformer_stage3": (24, 11), "biformer_stage4": (9, 5)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_few(name, nvidia):
    """An attention without LePE, in one chunk; every further chunk takes about 15 launches more."""
    problem = replace(MODELS[name], batch=1, side_dwconv=0)
    packed = problem.attention(lambda *sizes: torch.randn(sizes).half())
    with pretended.no_waits(), pretended.Launches() as forward:
        out, saved = torch_backend.attend(packed, trains=True)
    grad_out = torch.randn_like(out)
    with torch.no_grad(), pretended.no_waits(), pretended.Launches() as backward:
        torch_backend.attend_backward(grad_out, packed, out, saved, Needs())
    most_forward, most_backward = LAUNCHES[name]
    assert len(forward.names) <= most_forward, forward.names
    assert len(backward.names) <= most_backward, backward.names


# MiB that a training step of the reference took on an H100 (docs/gpu_check.md; float16, batch 8).
REFERENCE = {"yolo_p5": 52.6, "biformer_stage2": 37.0, "biformer_stage3": 55.8}


@pytest.mark.parametrize("name", REFERENCE)
def test_small_maps_take_less_memory_than_the_reference(name, nvidia):
    problem = replace(MODELS[name], batch=8, side_dwconv=0)
    packed = problem.attention(lambda *sizes: torch.randn(sizes).half())
    grad_out = torch.randn(*packed.qkv.shape[:3], packed.dim).half()
    with torch.no_grad(), pretended.LiveBytes() as memory:
        out, saved = torch_backend.attend(packed, trains=True)
        torch_backend.attend_backward(grad_out, packed, out, saved, Needs())
    assert memory.peak < REFERENCE[name] * 2**20, memory.peak / 2**20


def test_the_kernel_is_chosen_once_a_pass(nvidia, monkeypatch):
    """Asking PyTorch whether its kernel serves takes as long as a launch. Here a pass has three parts."""
    chosen, choose = [], chunks.kernel_for
    monkeypatch.setattr(chunks, "kernel_for", lambda *sizes: chosen.append(sizes) or choose(*sizes))
    monkeypatch.setattr(chunks, "regions_at_once", lambda *args, **kwargs: 1)
    problem = replace(MODELS["biformer_stage4"], batch=3, n_win=7, topk=4, side_dwconv=0)
    packed = problem.attention(lambda *sizes: torch.randn(sizes).half())
    out, saved = torch_backend.attend(packed, trains=True)
    torch_backend.attend_backward(torch.randn_like(out), packed, out, saved, Needs())
    assert len(chosen) == 2


@pytest.mark.parametrize(("is_complete", "dtype"), [(True, torch.float16), (False, torch.float32)])
def test_sums_of_several_chunks_are_kept_in_float32(is_complete, dtype, nvidia):
    """Float32 is needed if chunks add to the same regions; otherwise each sum is rounded only once."""
    total = None
    for first in (0, 3):
        index = torch.tensor([first, first + 2], dtype=torch.int32)
        choices = sums.Choices(index, None, range(first, first + 3), is_complete)
        total = choices.add(torch.ones(2, 4, dtype=torch.float16), total, n_regions=6)
    assert total.dtype == dtype
    assert total[:, 0].tolist() == [1, 0, 1, 1, 0, 1]
