"""Choosing the regions to attend to, from region-level logits, in plain PyTorch."""

import torch
from torch import Tensor


def select_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` largest logits of each row, largest first; equal logits by the smaller index first.

    Args:
        logits: `(..., P)`.
        topk: how many to take, at most `P`.

    Returns:
        Their values and their indices (int64), both `(..., topk)`.
    """
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK breaks ties as demanded here.
        return torch.topk(logits, topk, dim=-1)
    # torch.topk leaves the order of equal logits open, and it differs between devices.
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[..., :topk], indices[..., :topk]
