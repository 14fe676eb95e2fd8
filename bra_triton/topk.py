"""Chooses the regions to attend to by the regions' logits, in plain PyTorch."""

import torch
from torch import Tensor


def select_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` largest logits of each row, largest first; among equal logits the smaller index first.

    Args:
        logits: `(..., P)`.
        topk: how many to take, at most `P`.

    Returns:
        Their values and their indices (int64), both `(..., topk)`.
    """
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK orders equal logits as this function must.
        return torch.topk(logits, topk, dim=-1)
    # torch.topk does not define the order of equal logits, which differs between devices.
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[..., :topk], indices[..., :topk]
