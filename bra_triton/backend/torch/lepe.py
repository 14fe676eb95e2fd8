"""LePE of the torch backend: PyTorch's convolution, on any device and in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.problem import Lepe, LepeGradients, statistic_dtype
from .regions import without_padding


def lepe_forward(attention: Tensor, lepe: Lepe[Tensor]) -> Tensor:
    """The attention's output `(N, H, W, dim)` and the convolution of the values, added up."""
    out = _convolve(_values_in_reach(lepe), lepe.weight, lepe.bias).permute(0, 2, 3, 1)
    # Into memory that nobody else has: a third map would cost time and memory. And not a view of it, which
    # PyTorch would let nobody change in place.
    return dense(without_padding(out, lepe.grid)).add_(attention).data


def lepe_backward(
    grad_out: Tensor, grad_value: Tensor, lepe: Lepe[Tensor], needs_weight_grad: bool = True
) -> LepeGradients[Tensor]:
    """Adds the values' gradient to `grad_value` `(N, H, W, dim)`, and returns the others."""
    height, width = lepe.grid.height, lepe.grid.width
    reach_height, reach_width = lepe.reach
    sum_dtype = statistic_dtype(lepe.value.dtype)
    grad_out = F.pad(grad_out.permute(0, 3, 1, 2), (0, reach_width - width, 0, reach_height - height))
    wanted = (needs_weight_grad, needs_weight_grad and lepe.bias is not None)
    derive = _derive_on_cpu if grad_out.device.type == "cpu" else derive_by_taps
    grad, grad_weight, grad_bias = derive(grad_out, _values_in_reach(lepe), lepe.weight, wanted)
    grad_value.add_(grad[..., :height, :width].permute(0, 2, 3, 1))
    grad_fill = None
    if lepe.fill is not None:
        below, beside = grad[..., height:, :], grad[..., :height, width:]
        grad_fill = below.sum((0, 2, 3), dtype=sum_dtype) + beside.sum((0, 2, 3), dtype=sum_dtype)
    return LepeGradients(
        *(None if small is None else small.to(sum_dtype) for small in (grad_weight, grad_bias, grad_fill))
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The depthwise convolution of `(N, dim, H, W)`."""
    dim, half = x.shape[1], weight.shape[-1] // 2
    return torch.ops.aten.convolution(x, weight, bias, [1, 1], [half, half], [1, 1], False, [0, 0], dim)


_Derived = tuple[Tensor, Tensor | None, Tensor | None]


def _derive_on_cpu(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> _Derived:
    """As `derive_by_taps`, in up to a fourth of the time."""
    dim, half = x.shape[1], weight.shape[-1] // 2
    # The bias apart: oneDNN takes up to 50 times as long for it as a sum does (8 x 56 x 56 x 64, one core).
    numbers = (None, [1, 1], [half, half], [1, 1], False, [0, 0], dim, [True, wanted[0], False])
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *numbers)
    return grad_x, grad_weight, grad.sum((0, 2, 3), dtype=statistic_dtype(grad.dtype)) if wanted[1] else None


def derive_by_taps(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> _Derived:
    """Gradients of the convolution's map, weight and bias, in an order that never changes.

    cuDNN may add the weight's gradient in a changing order unless a flag of the whole process forbids it.

    Args:
        grad: `(N, dim, H, W)`.
        x: the map, `(N, dim, H, W)`.
        weight: `(dim, 1, k, k)`.
        wanted: whether the weight's gradient is, and the bias's; None without.
    """
    grad_x = _convolve(grad, weight.flip(2, 3), None)
    if not any(wanted):
        return grad_x, None, None
    grad = grad.to(statistic_dtype(grad.dtype))
    height, width = x.shape[2:]
    padded = F.pad(x, (weight.shape[-1] // 2,) * 4)
    grad_weight = torch.empty_like(weight, dtype=grad.dtype)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            met = padded[..., i : i + height, j : j + width]
            grad_weight[:, 0, i, j] = (grad * met).sum((0, 2, 3))
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if wanted[1] else None


def _values_in_reach(lepe: Lepe[Tensor]) -> Tensor:
    """The values and what padding the convolution can see: `(N, dim, *reach)`."""
    value = lepe.value
    if lepe.fill is not None:
        value = lepe.fill.expand(value.shape[0], *lepe.reach, -1).clone()
        value[:, : lepe.grid.height, : lepe.grid.width] = lepe.value
    # PyTorch's own copy of a slice of a packed map takes oneDNN two to three times as long.
    return value.contiguous().permute(0, 3, 1, 2)
