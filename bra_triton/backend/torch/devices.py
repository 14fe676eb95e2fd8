"""What the torch backend distinguishes devices by; the one place that looks at them."""

import torch
from torch import Tensor


def kind(x: Tensor) -> str:
    """`"cpu"`, `"cuda"` for NVIDIA, `"hip"` for AMD, or PyTorch's name of any other type of device."""
    return "hip" if x.device.type == "cuda" and torch.version.hip else x.device.type
