"""Attention over given regions on the fused backends, against the float64 oracle."""

import pytest
import torch
from problems import relative_error
from regional_problems import REGIONAL_CASES, REGIONAL_CASES_BY_NAME, log_problems

from bra_triton.functional import regional_routing_attention
from bra_triton.operators import regional as operators

BACKENDS = ("torch", "triton")
# For `relative_error`, the norm of the difference divided by the norm of the truth. Rounding of float32 gives
# 1 to 4e-7 at these sizes; a wrong tail, mask or scale gives 1e-3 and more.
FLOAT32_TOLERANCE = 1e-5
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _attend_and_derive(attend, maps, grad_out):
    """Output and gradients of the maps; `grad_out` has the dtype of the maps."""
    maps = [x.detach().requires_grad_() for x in maps]
    out = attend(*maps)
    return [out.detach(), *torch.autograd.grad(out, maps, grad_out)]


@every_backend
@pytest.mark.parametrize("case", REGIONAL_CASES, ids=lambda case: case.name)
def test_float32_matches_the_float64_oracle(case, backend, device):
    maps, graph = [x.to(device) for x in case.maps()], case.graph().to(device)
    grad_out = torch.randn(case.batch, maps[2].shape[1], *case.size, device=device)

    def oracle(*maps):
        return regional_routing_attention(*maps, case.scale, graph, **case.numbers, backend="reference")[0]

    def fused(*maps):
        return regional_routing_attention(*maps, case.scale, graph, **case.numbers, backend=backend)[0]

    expected = _attend_and_derive(oracle, maps, grad_out.double())
    actual = _attend_and_derive(fused, [x.float() for x in maps], grad_out)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) < FLOAT32_TOLERANCE, errors


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "channel slice": lambda x: _channels_last(torch.cat((x, x), 1))[:, x.shape[1] :],
    "rows before columns": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "columns cut out": lambda x: _channels_last(torch.cat((x, x), 3))[..., : x.shape[3]],
    "rows cut out": lambda x: _channels_last(torch.cat((x, x), 2))[:, :, : x.shape[2]],
    "one image expanded": lambda x: _channels_last(x[:1]).expand(x.shape),
}
READ_IN_PLACE = ("channels_last", "channel slice")


# Layouts are handled before the backend is called, so one layout is enough for the interpreter.
@pytest.mark.parametrize(
    ("layout", "backend"), [*((name, "torch") for name in LAYOUTS), ("channel slice", "triton")]
)
def test_memory_layout_does_not_change_the_result(layout, backend, device):
    case = REGIONAL_CASES_BY_NAME["batch"]
    maps = [x[:1].repeat(2, 1, 1, 1).float().to(device) for x in case.maps()]
    graph = case.graph().to(device)
    grad_out = torch.randn(case.batch, maps[2].shape[1], *case.size, device=device)

    def attend(*maps):
        return regional_routing_attention(*maps, case.scale, graph, **case.numbers, backend=backend)[0]

    expected = _attend_and_derive(attend, maps, grad_out)
    strided = [LAYOUTS[layout](x) for x in maps]
    actual = _attend_and_derive(attend, strided, LAYOUTS[layout](grad_out[:1].repeat(2, 1, 1, 1)))
    assert torch.equal(actual[0], expected[0])
    derived = _attend_and_derive(attend, maps, grad_out[:1].repeat(2, 1, 1, 1))
    assert all(torch.equal(a, e) for a, e in zip(actual, derived, strict=True))


class TestDenseTokens:
    """Which maps are read in place."""

    @pytest.mark.parametrize("size", [(4, 5), (1, 5), (5, 1)])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_channels_last_maps_and_their_slices_are(self, size, batch):
        packed = torch.randn(batch, 12, *size).contiguous(memory_format=torch.channels_last)
        for x in (packed, *packed.chunk(3, 1)):
            x = x.permute(0, 2, 3, 1)
            assert operators.with_dense_tokens(x) is x

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in READ_IN_PLACE])
    def test_others_are_copied(self, layout):
        x = LAYOUTS[layout](torch.randn(2, 4, 3, 5)).permute(0, 2, 3, 1)
        dense = operators.with_dense_tokens(x)
        assert dense.is_contiguous()
        assert dense.data_ptr() != x.data_ptr()
        assert torch.equal(dense, x)

    def test_a_token_expanded_over_the_map_is_copied(self):
        x = torch.randn(1, 1, 1, 4).expand(1, 3, 5, 4)
        assert operators.with_dense_tokens(x).is_contiguous()

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("height", [1, 2, 3])
    def test_columns_cut_out_of_a_wider_map_are_copied_but_for_those_of_one_row(self, height, batch):
        x = torch.randn(batch, height, 7, 4)[:, :, :5]
        assert (operators.with_dense_tokens(x) is x) == (height == batch == 1)

    def test_the_stride_between_tokens_is_right_in_a_column_of_single_tokens(self):
        x = torch.as_strided(torch.randn(100), (1, 6, 1, 4), (100, 8, 99, 1))
        assert operators.with_dense_tokens(x).stride()[1:] == (4, 4, 1)


def test_a_graph_expanded_over_the_heads_is_one_graph(monkeypatch):
    problems = log_problems(monkeypatch)
    case = REGIONAL_CASES_BY_NAME["whole"]
    maps, graph = case.maps(), case.graph()
    shared = graph[:, :1].expand(-1, case.num_heads, -1, -1)
    outs = [
        regional_routing_attention(*maps, case.scale, g, **case.numbers, backend="torch")[0]
        for g in (graph, shared, shared.contiguous())
    ]
    assert [problem.n_graphs for problem in problems] == [2, 1, 2]
    assert torch.equal(outs[1], outs[2])
    assert not torch.allclose(outs[0], outs[1])


@every_backend
def test_a_graph_of_int32_serves_too(backend, device):
    case = REGIONAL_CASES_BY_NAME["padded"]
    maps, graph = [x.float().to(device) for x in case.maps()], case.graph().to(device)
    outs = [
        regional_routing_attention(*maps, case.scale, g, **case.numbers, backend=backend)[0]
        for g in (graph, graph.int())
    ]
    assert torch.equal(*outs)


WRONG = {
    "query_dim": ({"query": torch.randn(4, 4)}, r"query must be \(N, C, H, W\), got shape \(4, 4\)"),
    "int": (
        {"query": torch.ones(1, 4, 4, 6, dtype=torch.int64)},
        "query must be float32, float16, bfloat16 or float64, got torch.int64",
    ),
    "dtype": (
        {"value": torch.randn(1, 4, 4, 6).half()},
        "value must have the dtype of query, torch.float32, got torch.float16",
    ),
    "device": (
        {"key": torch.randn(1, 4, 4, 6, device="meta")},
        "key must have the device of query, cpu, got meta",
    ),
    "batch": (
        {"key": torch.randn(2, 4, 4, 6)},
        r"key must have query's batch and channels, \(1, 4\), got shape \(2, ",
    ),
    "channels": ({"key": torch.randn(1, 2, 4, 6)}, r"key must have query's batch and channels, \(1, 4\)"),
    "value_size": (
        {"value": torch.randn(1, 4, 4, 5)},
        r"value must have key's .*, \(1, 4, 6\), got shape \(1, 4, 4, 5\)",
    ),
    "scale": ({"scale": 0.0}, "scale must be a number from -1e38 to 1e38 other than 0, got 0.0"),
    "region_size": ({"region_size": (0, 3)}, r"region_size must be two ints of at least 1, got \(0, 3\)"),
    "region_size_int": ({"region_size": 2}, "region_size must be two ints of at least 1, got 2"),
    "kv_region_size": ({"kv_region_size": (2.0, 3)}, r"kv_region_size must be two ints .*, got \(2.0, 3\)"),
    "auto_pad": (
        {"region_size": (3, 3), "auto_pad": False},
        r"query's .* multiples of region_size=\(3, 3\) if auto_pad=False, got 4 x 6",
    ),
    "kv_auto_pad": (
        {"kv_region_size": (2, 4), "auto_pad": False},
        r"key's .* multiples of kv_region_size=\(2, 4\) if auto_pad=False, got 4 x 6",
    ),
    "graph_dim": (
        {"region_graph": torch.zeros(1, 4, 2).long()},
        r"region_graph must be \(N, num_heads, P, topk\)",
    ),
    "graph_batch": (
        {"region_graph": torch.zeros(2, 2, 4, 1).long()},
        r"with N=1 and P=2\*2=4, got shape \(2, 2, 4, 1\)",
    ),
    "graph_regions": (
        {"region_graph": torch.zeros(1, 2, 5, 1).long()},
        r"P=2\*2=4, got shape \(1, 2, 5, 1\)",
    ),
    "graph_dtype": (
        {"region_graph": torch.zeros(1, 2, 4, 1)},
        "region_graph must be int64 or int32, got torch.float32",
    ),
    "graph_device": (
        {"region_graph": torch.zeros(1, 2, 4, 1, device="meta").long()},
        "region_graph must be on query's device, cpu, got meta",
    ),
    "heads": ({"region_graph": torch.zeros(1, 3, 4, 1).long()}, "must divide query's channels, 4, got 3"),
    "value_heads": ({"value": torch.randn(1, 3, 4, 6)}, "must divide value's channels, 3, got 2"),
    "topk": ({"region_graph": torch.zeros(1, 2, 4, 5).long()}, r"topk must be 1 to .* 2\*2=4, got 5"),
    "no_topk": ({"region_graph": torch.zeros(1, 2, 4, 0).long()}, "topk must be 1 to .*, got 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_explained(wrong):
    replaced, message = WRONG[wrong]
    maps = {name: torch.randn(1, 4, 4, 6) for name in ("query", "key", "value")}
    numbers = {"scale": 1.0, "region_graph": torch.zeros(1, 2, 4, 1).long(), "region_size": (2, 3)}
    with pytest.raises(ValueError, match=message):
        regional_routing_attention(**{**maps, **numbers, **replaced})


@every_backend
@pytest.mark.parametrize("changed", [False, True], ids=["", "output changed in place"])
def test_a_gradient_that_keeps_its_graph_is_the_same(changed, backend, device):
    """`create_graph=True` runs a backward with gradients enabled, which it must not record."""
    case = REGIONAL_CASES[0]
    maps, graph = [x.float().to(device) for x in case.maps()], case.graph().to(device)

    def gradients(**options):
        given = [x.detach().requires_grad_() for x in maps]
        out, _ = regional_routing_attention(*given, case.scale, graph, **case.numbers, backend=backend)
        return torch.autograd.grad((out.mul_(2) if changed else out).sum(), given, **options)

    assert all(map(torch.equal, gradients(create_graph=True), gradients()))


def test_an_unknown_backend_is_refused():
    case = REGIONAL_CASES_BY_NAME["whole"]
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"):
        regional_routing_attention(*case.maps(), 1.0, case.graph(), case.region_size, backend="cuda")


@every_backend
def test_autocast_does_not_reach_inside(backend, device):
    case = REGIONAL_CASES_BY_NAME["padded"]
    maps, graph = [x.float().to(device) for x in case.maps()], case.graph().to(device)
    expected = regional_routing_attention(*maps, case.scale, graph, **case.numbers, backend=backend)[0]
    with torch.autocast(device.type, torch.bfloat16):
        actual = regional_routing_attention(*maps, case.scale, graph, **case.numbers, backend=backend)[0]
    assert torch.equal(actual, expected)


def test_results_are_unpacked_as_upstream(device):
    """The authors' callers write `out, attn = ...`, which would split a single tensor if the batch is two."""
    case = next(case for case in REGIONAL_CASES if case.batch == 2)
    maps, graph = [x.float().to(device) for x in case.maps()], case.graph().to(device)
    numbers = {**case.numbers, "backend": "torch"}
    out, attn = regional_routing_attention(*maps, case.scale, graph, **numbers)
    assert attn is None
    same, attn = regional_routing_attention(*maps, case.scale, graph, **numbers, ret_attn_mask=True)
    assert relative_error(out, same.double()) < FLOAT32_TOLERANCE
    assert attn.shape[:3] == graph.shape[:3]
    assert torch.allclose(attn.sum(-1), torch.ones((), device=device))
