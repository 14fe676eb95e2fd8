"""Runs every branch of the operators through the package's modules and functions, at the smallest sizes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional

OPERATORS = frozenset(
    f"bra_triton::{name}{suffix}"
    for name in ("attend", "attend_regional", "region_means", "route", "pool_regions")
    for suffix in ("", "_backward")
)
DIFF = {"diff_routing": True}
SOFT = {"soft_routing": True}
CONV = {"kv_downsample_mode": "conv", "kv_downsample_ratio": 1, "kv_downsample_kernel": 2}
MAX = {"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 2}
# Arguments of the modules, and: "size", height and width of the map; "frozen", the start of the names of
# parameters that need no gradient; "nchw", to build the NCHW module.
BRANCHES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "without LePE": {"side_dwconv": 0},
    "padded": {"size": (3, 5)},
    "padded, without LePE": {"size": (3, 5), "side_dwconv": 0},
    "soft": SOFT,
    "hard": DIFF,
    "soft_diff, padded": SOFT | DIFF | {"size": (3, 5)},
    "param_routing, padded": SOFT | DIFF | {"param_routing": True, "size": (3, 5)},
    "maxima": MAX,
    "convolution, padded": CONV | {"size": (3, 5)},
    "everything": SOFT | DIFF | CONV | {"param_routing": True, "size": (3, 5)},
    "whole": {"topk": 4},
    "whole, padded": {"topk": 4, "size": (3, 5)},
    "regions of a token": {"n_win": 3, "topk": 5, "size": (3, 3)},
    "frozen projection": {"size": (3, 5), "frozen": "qkv"},
    "frozen LePE": {"frozen": "lepe"},
    "frozen bias of LePE": {"frozen": "lepe.bias"},
    "negative scale, soft": SOFT | {"qk_scale": -0.5},
    "NCHW": {"nchw": True},
    "NCHW, padded": {"nchw": True, "size": (3, 5)},
}


def module_of(branch: str, backend: str) -> nn.Module:
    """Builds the module of a branch."""
    arguments = {"dim": 4, "num_heads": 1, "n_win": 2, "topk": 2, **BRANCHES[branch]}
    _, frozen = arguments.pop("size", None), arguments.pop("frozen", None)
    if arguments.pop("nchw", False):
        module: nn.Module = NCHWBiLevelRoutingAttention(**arguments, backend=backend)
    else:
        module = BiLevelRoutingAttention(**arguments, qk_dim=2, auto_pad=True, backend=backend)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen is None or not name.startswith(frozen))
    return module


def map_of(branch: str, batch: int = 1) -> Tensor:
    """A random map for the module of a branch: `(batch, H, W, 4)`, or NCHW."""
    x = torch.randn(batch, *BRANCHES[branch].get("size", (4, 4)), 4)
    return x.permute(0, 3, 1, 2) if BRANCHES[branch].get("nchw") else x


def attend(branch: str, backend: str, batch: int, device: torch.device) -> None:
    """Runs the module of a branch: a forward without a gradient, then a forward and a backward."""
    module, x = module_of(branch, backend).to(device), map_of(branch, batch).to(device)
    with torch.no_grad():
        module(x)
    module(x.requires_grad_(BRANCHES[branch].get("frozen") != "qkv")).sum().backward()


def route(backend: str, batch: int, device: torch.device) -> None:
    """Runs forward and backward of the routing alone, of a padded map and of one without padding."""
    qkv = torch.randn(batch, 3, 5, 12, device=device, requires_grad=True)
    padding = torch.randn(12, device=device, requires_grad=True)
    numbers = {"n_win": 2, "topk": 3, "diff_routing": True, "backend": backend}
    for options in ({"padding": padding}, {"padding": padding.detach()}):
        functional.region_routing(qkv, **numbers, **options)[0].square().sum().backward()
    functional.region_routing(qkv[:, :2, :4], **numbers)[0].square().sum().backward()


def attend_regional(backend: str, batch: int, device: torch.device) -> None:
    """Runs attention over given regions, forward and backward.

    Once with one head on a map without padding, once with two heads, a graph for each, on a padded map.
    """
    for size, heads, width in (((4, 4), 1, 4), ((3, 5), 2, 6)):
        query, key = torch.randn(2, batch, 4, *size, device=device).requires_grad_()
        value = torch.randn(batch, width, *size, device=device, requires_grad=True)
        graph = torch.zeros(
            batch, heads, -(-size[0] // 2) * -(-size[1] // 2), 2, dtype=torch.int32, device=device
        )
        out, _ = functional.regional_routing_attention(query, key, value, 0.5, graph, (2, 2), backend=backend)
        out.sum().backward()


class Calls(TorchDispatchMode):
    """Dispatch mode: calls `take(operator, arguments, result)` after each call of the package's operators.

    Attributes:
        names: names of the operators that were called.
    """

    def __init__(self, take: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self.take = take
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "bra_triton":
            self.names.add(function.overloadpacket._qualified_op_name)
            self.take(function, args, result)
        return result
