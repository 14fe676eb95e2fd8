"""The layers inside the drop-in modules, and whether a layer may be bypassed.

To bypass a layer means that a backend computes the layer's result from its parameters, without calling it.
"""

from typing import Any

from torch import Tensor, nn

from ..arguments import is_whole


def depthwise_convolution(dim: int, side: int) -> nn.Conv2d | None:
    """LePE's layer, with a kernel of `side` x `side`; None for a side of 0.

    Raises:
        ValueError: if the side is not an int, is negative, or is even and not 0.
    """
    if not is_whole(side, 0) or (side % 2 == 0 and side != 0):
        raise ValueError(f"side_dwconv must be 0 or an odd kernel size, got {side!r}")
    return nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) if side else None


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether a layer may be bypassed: its class is exactly `kind`, and no hook or `forward` was set on it.

    Hooks for all modules do not count: PyTorch's FLOP counter sets them, to count what a backend computes.
    All other layers must be called: an adapter, a quantised or a parametrised layer has another class, and
    pruning and weight normalisation add hooks that compute the weight anew in every call.
    """
    if type(layer) is not kind:
        # torch.export wraps the layers of an exported module in other classes; `get_base` returns the layer.
        exported = getattr(layer, "get_base", None)
        return exported is not None and is_plain(exported(), kind)
    state = layer.__dict__  # a look-up here takes a quarter of the time of an attribute of a module
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def is_plain_convolution(layer: Any, groups: int) -> bool:
    """Whether a layer is a plain convolution with an odd square kernel that keeps the size of a map.

    It must have `groups` groups and pad the map with zeros.
    """
    if not is_plain(layer, nn.Conv2d):
        return False
    state = layer.__dict__
    height, width = state["kernel_size"]
    return (
        height == width
        and height % 2 == 1
        and state["padding"] == (height // 2, height // 2)
        and state["groups"] == groups
        and state["stride"] == (1, 1)
        and state["dilation"] == (1, 1)
        and state["padding_mode"] == "zeros"
    )


def is_plain_window(layer: Any, dim: int, kernel: int, stride: int) -> bool:
    """Whether a layer is a plain depthwise convolution of `dim` channels with a bias and without padding.

    It must have a kernel of `kernel` x `kernel` and the given stride.
    """
    if not is_plain(layer, nn.Conv2d):
        return False
    state = layer.__dict__
    return (
        (state["in_channels"], state["out_channels"], state["groups"]) == (dim, dim, dim)
        and (state["kernel_size"], state["stride"]) == ((kernel, kernel), (stride, stride))
        and (state["padding"], state["dilation"]) == ((0, 0), (1, 1))
        and plain_parameters(layer)[1] is not None
    )


def plain_parameters(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a plain layer."""
    parameters = layer._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        # Replicas of `nn.DataParallel`, and layers that FSDP has flattened, hold tensors as plain attributes.
        return layer.weight, layer.bias


def lepe_parameters(lepe: Any, dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of LePE's layer; `(None, None)` if there is no layer or if it must be called."""
    return plain_parameters(lepe) if is_plain_convolution(lepe, dim) else (None, None)
