"""What the operators have in common."""

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """Inside an operator the types are decided; autocast would round float32 statistics to half precision."""
    return torch.autocast(x.device.type, enabled=False)


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Type of softmax statistics, means and weights for maps like `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an empty tensor stands for it."""
    return like.new_empty(0) if x is None else x
