"""The kinds of devices that the torch backend distinguishes."""

import torch
from torch import Tensor


def kind(x: Tensor) -> str:
    """`"cpu"`, `"cuda"` for NVIDIA, `"hip"` for AMD, or PyTorch's name of any other type of device."""
    return "hip" if x.device.type == "cuda" and torch.version.hip else x.device.type
