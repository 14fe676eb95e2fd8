"""How autocast is turned off where the definition needs full precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which autocast is off on the device of `x`.

    The device "meta" has no autocast, and `torch.autocast` raises an error for it. Its name is compared here,
    because PyTorch 2.8 cannot compile `torch.amp.is_autocast_available`.
    """
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
