"""What PyTorch's dispatcher sees of the operators: their fake implementations, and what touches the map."""

import pytest
import torch
from operator_calls import BRANCHES, OPERATORS, Calls, attend, attend_regional, route
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

BACKENDS = ("torch", "triton")


def _layout(result):
    """Shape, strides and dtype of every tensor."""
    return [(tuple(x.shape), x.stride(), x.dtype) for x in tree_leaves(result)]


def _compare_with_fake(function, arguments, result):
    with FakeTensorMode() as fake:
        fakes = tree_map_only(torch.Tensor, fake.from_tensor, arguments)
        assert _layout(function(*fakes)) == _layout(result), function


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
class TestFakes:
    """Compilers allocate and read by what a fake implementation says."""

    @pytest.mark.parametrize("branch", BRANCHES)
    def test_attention(self, branch, backend, batch, device):
        with Calls(_compare_with_fake) as calls:
            attend(branch, backend, batch, device)
        assert {"bra_triton::attend", "bra_triton::attend_backward"} <= calls.names

    def test_routing(self, backend, batch, device):
        with Calls(_compare_with_fake) as calls:
            route(backend, batch, device)
        assert {"bra_triton::route_backward", "bra_triton::region_means_backward"} <= calls.names

    def test_attention_over_given_regions(self, backend, batch, device):
        with Calls(_compare_with_fake) as calls:
            attend_regional(backend, batch, device)
        assert calls.names == {"bra_triton::attend_regional", "bra_triton::attend_regional_backward"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_meet_pytorchs_own_checks(backend, device):
    """Schema, fake implementation, autograd registration and AOT dispatch with dynamic shapes."""
    calls = {}
    with Calls(lambda function, arguments, _: calls.setdefault(function, arguments)) as log:
        attend("everything", backend, 1, device)
        route(backend, 1, device)
        attend_regional(backend, 1, device)
    assert log.names == OPERATORS
    for function, arguments in calls.items():
        learns = not function.overloadpacket.__name__.endswith("_backward")
        arguments = tree_map_only(
            torch.Tensor,
            lambda x, learns=learns: x.detach().requires_grad_(learns and x.is_floating_point()),
            arguments,
        )
        torch.library.opcheck(function, arguments)
