"""LePE, the locally enhanced positional encoding: a depthwise convolution of the values (paper, eq. 6).

The values are a view of the packed projection and their gradient is added into the packed gradient, so that
autograd makes no zero-filled copy of the projection to hold a third of it. The convolution is PyTorch's,
which may copy the strided values inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def forward(qkv: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolves the values.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`.
        weight: `(dim, 1, k, k)`, `k` odd.
        bias: `(dim,)` or None.

    Returns:
        `(N, H, W, dim)`.
    """
    dim, kernel = weight.shape[0], weight.shape[-1]
    lepe = torch.ops.aten.convolution(
        _values(qkv, dim), weight, bias, [1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], dim
    )
    return lepe.permute(0, 2, 3, 1)


def backward(grad_out: Tensor, qkv: Tensor, weight: Tensor, grad_qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the values' gradient into `grad_qkv`, in place; returns the gradients of weight and bias."""
    dim, kernel = weight.shape[0], weight.shape[-1]
    with _deterministic_cudnn():
        grad_value, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_out.permute(0, 3, 1, 2),
            _values(qkv, dim),
            weight,
            [dim],
            [1, 1],
            [kernel // 2] * 2,
            [1, 1],
            False,
            [0, 0],
            dim,
            [True, True, True],
        )
    grad_qkv[..., -dim:].add_(grad_value.permute(0, 2, 3, 1))
    return grad_weight, grad_bias


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """cuDNN may add the weights' gradient in a changing order unless told otherwise."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _values(qkv: Tensor, dim: int) -> Tensor:
    return qkv[..., -dim:].permute(0, 3, 1, 2)
