"""LePE of the torch backend: PyTorch's convolution, on any device and in any floating dtype."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.problem import Lepe, LepeGradients, statistic_dtype


def lepe_forward(attention: Tensor, lepe: Lepe[Tensor]) -> Tensor:
    """The attention's output `(N, H, W, dim)` and the convolution of the values, added up."""
    height, width = lepe.grid.height, lepe.grid.width
    dim, half = lepe.value.shape[-1], lepe.kernel_size // 2
    out = torch.ops.aten.convolution(
        _values_in_reach(lepe), lepe.weight, lepe.bias, [1, 1], [half, half], [1, 1], False, [0, 0], dim
    )
    return attention + out[..., :height, :width].permute(0, 2, 3, 1)


def lepe_backward(
    grad_out: Tensor, grad_value: Tensor, lepe: Lepe[Tensor], needs_weight_grad: bool = True
) -> LepeGradients[Tensor]:
    """Adds the values' gradient to `grad_value` `(N, H, W, dim)`, and returns the others."""
    height, width = lepe.grid.height, lepe.grid.width
    reach_height, reach_width = lepe.reach
    dim, half = lepe.value.shape[-1], lepe.kernel_size // 2
    sum_dtype = statistic_dtype(lepe.value.dtype)
    with _deterministic_cudnn():
        grad, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            F.pad(grad_out.permute(0, 3, 1, 2), (0, reach_width - width, 0, reach_height - height)),
            _values_in_reach(lepe),
            lepe.weight,
            [dim],
            [1, 1],
            [half, half],
            [1, 1],
            False,
            [0, 0],
            dim,
            [True, needs_weight_grad, needs_weight_grad and lepe.bias is not None],
        )
    grad_value.add_(grad[..., :height, :width].permute(0, 2, 3, 1))
    grad_fill = None
    if lepe.fill is not None:
        below, beside = grad[..., height:, :], grad[..., :height, width:]
        grad_fill = sum(part.sum((0, 2, 3), dtype=sum_dtype) for part in (below, beside))
    return LepeGradients(
        *(None if small is None else small.to(sum_dtype) for small in (grad_weight, grad_bias, grad_fill))
    )


def _values_in_reach(lepe: Lepe[Tensor]) -> Tensor:
    """The values and what padding the convolution can see: `(N, dim, *reach)`."""
    value = lepe.value
    if lepe.fill is not None:
        value = lepe.fill.expand(value.shape[0], *lepe.reach, -1).clone()
        value[:, : lepe.grid.height, : lepe.grid.width] = lepe.value
    return value.permute(0, 3, 1, 2)


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """cuDNN may add the weights' gradient in a changing order unless told otherwise."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
