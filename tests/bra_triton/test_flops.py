"""PyTorch's counter of floating-point operations counts fused backends like the reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional
from bra_triton.kernels.grid import RegionGrid

SOFT = {"soft_routing": True, "diff_routing": True}
# Modes whose operators differ; (8, 9) needs padding.
MODULES = {
    "default": (BiLevelRoutingAttention, {}, (8, 8)),
    "padded, narrow keys": (BiLevelRoutingAttention, {"auto_pad": True, "qk_dim": 8}, (8, 9)),
    "no LePE": (BiLevelRoutingAttention, {"side_dwconv": 0}, (8, 8)),
    "a layer of the router": (BiLevelRoutingAttention, SOFT | {"param_routing": True}, (8, 8)),
    "fewer keys": (
        BiLevelRoutingAttention,
        {"kv_downsample_mode": "conv", "kv_downsample_ratio": 2},
        (8, 8),
    ),
    "NCHW": (NCHWBiLevelRoutingAttention, {}, (8, 9)),
}


def _count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _module(name, backend):
    kind, arguments, size = MODULES[name]
    x = torch.randn(2, *size, 16)
    x = x if kind is BiLevelRoutingAttention else x.permute(0, 3, 1, 2)
    return kind(16, 2, 4, topk=3, **arguments, backend=backend), x


@pytest.mark.parametrize("name", MODULES)
def test_a_forward_counts_as_much_as_the_references(name):
    counts = []
    for backend in ("torch", "reference"):
        module, x = _module(name, backend)
        counts.append(_count(lambda module=module, x=x: module(x)))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", [name for name in MODULES if name != "fewer keys"])
def test_a_training_step_computes_the_scores_once_more(name):
    """PyTorch counts its own fused attention in the same way. LePE is left out, because its backward is
    counted as that of a dense convolution."""
    counts = []
    for backend in ("torch", "reference"):
        module, x = _module(name, backend)
        module.lepe = None
        counts.append(_count(lambda module=module, x=x: module(x.requires_grad_()).sum().backward()))
    grid = module.grid(x) if "NCHW" in name else RegionGrid.of_windows(*x.shape[1:3], 4)
    scores = 2 * grid.n_regions * grid.region_tokens * 3 * grid.region_tokens * module.spec.qk_dim
    assert counts[0] - counts[1] == 2 * scores


def test_the_routers_backward_counts_the_gradients_of_both_factors():
    qkv = torch.randn(1, 8, 8, 48, requires_grad=True)

    def route():
        return functional.region_routing(qkv, n_win=4, topk=3, diff_routing=True, backend="torch")[0]

    forward, step = _count(route), _count(lambda: route().sum().backward())
    assert step == 3 * forward > 0


def test_the_routing_and_a_given_graph():
    qkv, maps = torch.randn(1, 8, 8, 48), torch.randn(3, 1, 16, 8, 8)
    graph = torch.zeros(1, 2, 16, 3, dtype=torch.int64)

    def route(backend):
        return functional.region_routing(qkv, n_win=4, topk=3, backend=backend)

    def attend(backend):
        return functional.regional_routing_attention(*maps, 0.3, graph, (2, 2), backend=backend)[0]

    for run in (route, attend):
        assert _count(lambda run=run: run("torch")) == _count(lambda run=run: run("reference")) > 0
    maps.requires_grad_()
    counts = [_count(lambda b=backend: attend(b).sum().backward()) for backend in ("torch", "reference")]
    assert counts[0] - counts[1] == 2 * 64 * 3 * 4 * 16
