"""Graphs with an entry that is no region: an error if values can be checked, else the nearest region."""

import pytest
import torch

from bra_triton import regional_call
from bra_triton.functional import regional_routing_attention

BACKENDS = ("torch", "triton", "reference")
# Without their upper 32 bits, 2**32 is 0 and 2**32 - 1 is -1.
OUTSIDE = (4, -1, 2**31 - 1, -(2**31), 2**32, 2**32 - 1, -(2**63))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def _maps(device):
    return [x.to(device).requires_grad_() for x in torch.randn(3, 2, 8, 4, 4)]


def _graph(device, entry=0, dtype=torch.int64):
    graph = torch.randint(4, (2, 2, 4, 2), dtype=dtype, generator=torch.Generator().manual_seed(0))
    graph[1, 0, 2, 1] = entry
    return graph.to(device)


def _attend(maps, graph, backend):
    return regional_routing_attention(*maps, 0.3, graph, (2, 2), backend=backend)[0]


def _results(maps, graph, backend):
    """Output and gradients."""
    out = _attend(maps, graph, backend)
    return [out, *torch.autograd.grad(out.square().sum(), maps)]


def _fits(entry, dtype):
    return torch.iinfo(dtype).min <= entry <= torch.iinfo(dtype).max


@every_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("entry", OUTSIDE)
def test_an_entry_outside_is_an_error(entry, dtype, backend, device, monkeypatch):
    monkeypatch.setenv("BRA_TRITON_CHECK", "1")  # on the CPU values are checked without it
    if device.type == "cpu":
        monkeypatch.delenv("BRA_TRITON_CHECK")
    if not _fits(entry, dtype):
        pytest.skip("not a number of the dtype")
    with pytest.raises(ValueError, match=f"region_graph must name key regions from 0 to 3, got {entry}$"):
        _attend(_maps(device), _graph(device, entry, dtype), backend)


@pytest.mark.parametrize(("value", "asked"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_asks_for_the_check_by_1(value, asked, monkeypatch):
    monkeypatch.delenv("BRA_TRITON_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("BRA_TRITON_CHECK", value)
    assert regional_call._is_asked_for() is asked
    monkeypatch.setenv("BRA_TRITON_CHECK", "true")
    with pytest.raises(ValueError, match="BRA_TRITON_CHECK must be 0 or 1, got 'true'"):
        regional_call._is_asked_for()


@every_backend
@pytest.mark.parametrize("entry", [2**32, -1, 9])
def test_where_values_are_not_looked_at_it_counts_as_the_nearest_region(entry, backend, device, monkeypatch):
    monkeypatch.setattr(regional_call, "_has_values", lambda x: False)
    maps = _maps(device)
    expected = _results(maps, _graph(device, min(max(entry, 0), 3)), backend)
    actual = _results(maps, _graph(device, entry), backend)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_compiled_graph_counts_it_so(backend, device):
    maps, graph = _maps(device), _graph(device, 2**32)
    torch._dynamo.reset()
    compiled = torch.compile(_attend, fullgraph=True, backend="aot_eager")
    expected = _attend(maps, graph.clamp(0, 3), backend)
    assert torch.allclose(compiled(maps, graph, backend), expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_so_does_an_exported_one(backend):
    class Model(torch.nn.Module):
        def forward(self, query, key, value, graph):
            return _attend((query, key, value), graph, backend)

    inputs = [x.detach() for x in _maps("cpu")]
    exported = torch.export.export(Model(), (*inputs, _graph("cpu"))).module()
    for entry in (2**32, -1):
        graph = _graph("cpu", entry)
        assert torch.allclose(
            exported(*inputs, graph), _attend(inputs, graph.clamp(0, 3), backend), atol=1e-6
        )


@every_backend
def test_any_strides_serve(backend, device):
    """Graphs expanded over images, heads, regions or choices, transposed, or a slice of a wider graph."""
    maps, graph = _maps(device), _graph(device)
    wider = graph.repeat_interleave(2, dim=-1)
    layouts = [
        *(graph.narrow(axis, 0, 1).expand(graph.shape) for axis in range(4)),
        graph.transpose(1, 3).contiguous().transpose(1, 3),
        wider[..., ::2],
        graph[:1, :1, :1, :1].expand(graph.shape),
    ]
    for layout in layouts:
        expected = _results(maps, layout.contiguous(), "torch")
        actual = _results(maps, layout, backend)
        # Backends add in different orders.
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(actual, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_graph_on_a_gpu_is_looked_at_on_demand_alone(backend, device, monkeypatch):
    monkeypatch.delenv("BRA_TRITON_CHECK", raising=False)
    maps, graph = _maps(device), _graph(device, 9)
    _attend(maps, graph, backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = _attend(maps, graph, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, _attend(maps, graph.clamp(0, 3), backend))
