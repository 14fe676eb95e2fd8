"""LePE of the torch backend: PyTorch's convolution, on any device and in any floating dtype."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.arrays import dense
from ...kernels.problem import Lepe, statistic_dtype
from . import devices
from .regions import sum_over_padding


class LepeGradients(NamedTuple):
    """Gradients that the backward of LePE returns besides the values'; float32, or float64 if the map is.

    Attributes:
        weight: `(dim, 1, k, k)`; None unless asked for.
        bias: `(dim,)`; None without a bias, or unless asked for.
        fill: `(dim,)`; None without a fill.
    """

    weight: Tensor | None
    bias: Tensor | None
    fill: Tensor | None


def lepe_forward(attention: Tensor, lepe: Lepe[Tensor]) -> Tensor:
    """The sum of the attention's output `(N, H, W, dim)` and the convolution of the values."""
    x, weight, bias = _values_in_reach(lepe), lepe.weight, lepe.bias
    if devices.kind(x) == "cpu" and not _is_native(x.dtype):
        x, weight, bias = _in_float32(x), _in_float32(weight), None if bias is None else _in_float32(bias)
    out = _convolve(_channels_last(x), weight, bias).permute(0, 2, 3, 1)
    out = out[:, : lepe.grid.height, : lepe.grid.width]
    if devices.kind(out) == "cuda":  # the convolution returns NCHW memory: one launch transposes and adds
        return dense(attention + out)
    # Add in place, into the convolution's own output: a third map would cost time and memory. `.data` makes
    # the result a plain tensor: PyTorch refuses in-place changes of a view that a custom Function returns.
    return dense(out).add_(attention).to(attention.dtype).data


def lepe_backward(
    grad_out: Tensor, grad_value: Tensor, lepe: Lepe[Tensor], needs_weight_grad: bool = True
) -> LepeGradients:
    """Adds the values' gradient to `grad_value` `(N, H, W, dim)`, and returns the other gradients."""
    height, width = lepe.grid.height, lepe.grid.width
    reach_height, reach_width = lepe.reach
    sum_dtype = statistic_dtype(lepe.value.dtype)
    grad_out = grad_out.permute(0, 3, 1, 2)
    if (reach_height, reach_width) != (height, width):
        grad_out = F.pad(grad_out, (0, reach_width - width, 0, reach_height - height))
    wanted = (needs_weight_grad, needs_weight_grad and lepe.bias is not None)
    derive = {"cpu": _derive_on_cpu, "cuda": _derive_on_nvidia}.get(devices.kind(grad_out), derive_by_taps)
    grad, grad_weight, grad_bias = derive(grad_out, _values_in_reach(lepe), lepe.weight, wanted)
    grad_value.add_(grad[..., :height, :width].permute(0, 2, 3, 1))
    grad_fill = None
    if lepe.fill is not None:
        grad_fill = sum_over_padding(grad.permute(0, 2, 3, 1), lepe.grid)
    return LepeGradients(
        *(None if small is None else small.to(sum_dtype) for small in (grad_weight, grad_bias, grad_fill))
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The depthwise convolution of `(N, dim, H, W)`."""
    dim, half = x.shape[1], weight.shape[-1] // 2
    if devices.kind(x) == "cuda" and 0 < x.numel() < _INDEXED_BY_32_BITS:
        # Call PyTorch's own kernel, not cuDNN: it adds up in float32, and adds the bias in the same launch.
        # cuDNN rounds float32 to TF32 by default, and times several algorithms first if `benchmark` is set.
        sides = list(weight.shape[2:])
        return torch.ops.aten._conv_depthwise2d(x, weight, sides, bias, [1, 1], [half, half], [1, 1])
    return torch.ops.aten.convolution(x, weight, bias, [1, 1], [half, half], [1, 1], False, [0, 0], dim)


# PyTorch's own depthwise kernels for NVIDIA support only tensors of fewer elements than this.
_INDEXED_BY_32_BITS = 2**31
_Derived = tuple[Tensor, Tensor | None, Tensor | None]


def _derive_on_cpu(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> _Derived:
    """As `derive_by_taps`, but four to five times as fast."""
    # In float16 they would take 40 to 120 times as long, whatever instructions oneDNN may use (8 x 28 x 28 x
    # 128, AVX2 to AVX-512 with float16); in bfloat16 up to twice, with AVX2 20 to 40 times as long.
    grad, x, weight = (_in_float32(each) for each in (grad, x, weight))
    # Compute the bias's gradient separately, by a sum. oneDNN takes up to 50 times as long for it as the sum
    # (8 x 56 x 56 x 64, one core).
    grad_bias = grad.sum((0, 2, 3)) if wanted[1] else None
    side = weight.shape[-1]
    if side > _FAST_COLUMNS and x.shape[-1] > side // 2 and grad.dtype == torch.float32:
        # First the weight's gradient: its copies of the map are freed before the map's gradient is made.
        grad_weight = _weight_gradient_by_columns(grad, x, weight) if wanted[0] else None
        return _convolve(grad, weight.flip(2, 3), None), grad_weight, grad_bias
    grad_x, grad_weight = _convolution_backward(grad, _channels_last(x), weight, side // 2, [True, wanted[0]])
    assert grad_x is not None
    return grad_x, grad_weight, grad_bias


# oneDNN has a fast kernel for the weight's gradient of depthwise kernels of at most this many columns, in
# float32. At 5 x 5 the gradient of three columns and that of two take together a quarter of the time of all
# five (8 x 56 x 56 x 64 and smaller, two cores of an x86 server, with AVX-512 or AVX2).
_FAST_COLUMNS = 3


def _in_float32(x: Tensor) -> Tensor:
    """Half precision as float32; other tensors as they are."""
    return x.to(statistic_dtype(x.dtype))


@cache
def _is_native(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in this dtype on this processor.

    If not, PyTorch's own convolution in half precision takes fifty times as long as in float32 (x86, AVX2,
    8 x 28 x 28 x 128). If it does, a forward takes up to twice as long in float32, mostly for the conversion.
    """
    if dtype not in _HALVES:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, _HALVES[dtype])())


_HALVES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def _weight_gradient_by_columns(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient, for a few columns of the kernel at a time."""
    side, found = weight.shape[-1], []
    for start in range(0, side, _FAST_COLUMNS):
        columns = weight[..., start : start + _FAST_COLUMNS]
        # A copy of the part of the padded map that these columns meet. Negative numbers remove columns.
        left = side // 2 - start
        met = F.pad(x, (left, columns.shape[-1] - 1 - left))
        _, part = _convolution_backward(grad, met, columns, 0, [False, True])
        assert part is not None
        found.append(part)
        del met  # frees its memory before the next copy is made
    return torch.cat(found, -1)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The wanted ones of the gradients of a depthwise convolution's map and weight.

    Args:
        grad: gradient of the output.
        x: the map.
        weight: `(dim, 1, k, k')`.
        padding: columns of zeros that the convolution adds on each side; it always adds `k // 2` rows.
        wanted: whether to compute the map's gradient, and the weight's.
    """
    paddings = [weight.shape[2] // 2, padding]
    numbers = ([1, 1], paddings, [1, 1], False, [0, 0], x.shape[1])
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *numbers, [*wanted, False]
    )
    return grad_x, grad_weight


def _derive_on_nvidia(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> _Derived:
    """As `derive_by_taps`, but in a few launches.

    cuDNN may add up in a changing order. PyTorch does not call it for contiguous float32 tensors of more than
    one channel, but a kernel of its own, in which one block computes one element of the weight's gradient.
    """
    dim, half = x.shape[1], weight.shape[-1] // 2
    if dim == 1 or x.numel() >= _INDEXED_BY_32_BITS:
        return derive_by_taps(grad, x, weight, wanted)
    dtype = statistic_dtype(grad.dtype)
    grad, x, weight = (
        dense(each.to(dtype, memory_format=torch.contiguous_format)) for each in (grad, x, weight)
    )
    grad_x, grad_weight = _convolve(grad, weight.flip(2, 3), None), None
    if wanted[0]:
        _, grad_weight = _convolution_backward(grad, x, weight, half, [False, True])
    return grad_x, grad_weight, grad.sum((0, 2, 3)) if wanted[1] else None


def derive_by_taps(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> _Derived:
    """Gradients of the convolution's map, weight and bias, added up in an order that never changes.

    cuDNN may add up the weight's gradient in a changing order, unless a flag of the whole process forbids it.

    Args:
        grad: gradient of the convolution's output, `(N, dim, H, W)`.
        x: the map, `(N, dim, H, W)`.
        weight: `(dim, 1, k, k)`.
        wanted: whether to compute the weight's gradient, and the bias's; otherwise that gradient is None.
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


def _channels_last(x: Tensor) -> Tensor:
    """A map `(N, dim, H, W)` in dense channels-last memory; on NVIDIA's GPUs the map itself.

    If PyTorch copies a slice of the packed map for oneDNN, the convolution takes two to three times as long.
    The kernels for NVIDIA's GPUs copy it to NCHW in any case.
    """
    return x if devices.kind(x) == "cuda" else x.contiguous(memory_format=torch.channels_last)


def _values_in_reach(lepe: Lepe[Tensor]) -> Tensor:
    """The values, with as much padding as the convolution reads: `(N, dim, *lepe.reach)`."""
    value = lepe.value
    if lepe.fill is not None:
        value = lepe.fill.expand(value.shape[0], *lepe.reach, -1).clone()
        value[:, : lepe.grid.height, : lepe.grid.width] = lepe.value
    return value.permute(0, 3, 1, 2)
