"""Linear layers on maps, computed as convolutions on CPUs where these may take half the time.

PyTorch's linear layers call MKL, which on processors not made by Intel uses AVX2 even if they have AVX-512;
its convolutions call oneDNN, which uses AVX-512. On two cores of an AMD EPYC, a convolution took 0.45 to 0.5
times as long as `F.linear` in a forward and 0.5 to 0.65 times in a training step (float32, batches of 2 and 8
maps of 14 to 160 tokens a side, 64 to 256 channels). On an EPYC of family 25 (Zen 4), which computes 512 bits
in two halves, the two took equally long. Where oneDNN may only use AVX2, too, a convolution saves at most a
quarter, and may take longer; so other processors keep their linear layers.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..export import is_eager
from ..kernels.lib.precision import float32_getter
from .library import is_seen


def is_convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `convolved` may compute a linear layer, and is faster than `torch.nn.functional.linear`.

    Args:
        x: the map, `(N, H, W, C)`.
        weight: `(C_out, C)`.
        bias: `(C_out,)`.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and is_eager()
        # The sizes come first: the other conditions would take microseconds of a call with a small map.
        and x.numel() > _MOST_OF_NATIVE
        and x.numel() * len(weight) >= _FEWEST_PRODUCTS
        and not is_seen((x, weight, bias))
        # A `TorchFunctionMode` may count or replace linear layers.
        and not torch._C._len_torch_function_stack()
        and _is_mkl_slow()
        # PyTorch calls oneDNN for such convolutions only if it has several threads.
        and torch.get_num_threads() > 1
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _is_exact()
        and x.is_contiguous()
        # A linear layer takes other parameters, too, such as sparse ones, or has an error that names them.
        and _is_of(weight, (len(weight), x.shape[-1]))
        and (bias is None or _is_of(bias, weight.shape[:1]))
    )


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of a contiguous map, by 1x1 convolutions; differentiable."""
    out: Tensor = _Convolved.apply(x, weight, bias)
    return out


class _Convolved(torch.autograd.Function):
    """A linear layer. Autograd's own backward of a convolution takes longer, because of the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        # As a linear layer, save only what the backward reads. The rest may be freed, or changed in place.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        out = torch.ops.aten.convolution(_nchw(x), _kernel(weight), bias, *_NUMBERS)
        # `.data` makes the result a plain tensor: PyTorch refuses in-place changes of a view that a custom
        # Function returns.
        return out.permute(0, 2, 3, 1).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if x is not None:
            # If only the weight's gradient is needed, PyTorch reads no more of the weight than its shape.
            like = x.new_empty(grad.shape[-1], x.shape[-1]) if weight is None else weight
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                _nchw(grad), _nchw(x), _kernel(like), None, *_NUMBERS, [weight is not None, True, False]
            )
        elif weight is not None:
            grad_x = torch.ops.aten.convolution(
                _nchw(grad.contiguous()), _kernel(weight.t()), None, *_NUMBERS
            )
        return (
            None if grad_x is None else grad_x.permute(0, 2, 3, 1),
            None if grad_weight is None else grad_weight[:, :, 0, 0],
            # oneDNN would take about ten times as long for this sum.
            grad.sum((0, 1, 2)) if ctx.needs_input_grad[2] else None,
        )


# PyTorch does not call oneDNN for a single map of at most this many elements.
_MOST_OF_NATIVE = 20480
# With fewer products the calls take longer than the products (two cores, 64 to 512 channels).
_FEWEST_PRODUCTS = 1 << 23
# Stride, padding, dilation, whether it is transposed, output padding and groups of a 1x1 convolution.
_NUMBERS = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _kernel(weight: Tensor) -> Tensor:
    return weight[:, :, None, None]


def _is_of(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    return (
        parameter.shape == shape
        and parameter.dtype == torch.float32
        and parameter.device.type == "cpu"
        and parameter.layout == torch.strided
    )


@cache
def _is_mkl_slow() -> bool:
    """Whether the processor has AVX-512, but MKL does not use it."""
    read = getattr(torch.cpu, "get_capabilities", dict)  # older versions of PyTorch do not have it
    found: dict[str, Any] = read()
    is_intel = "intel" in found.get("cpu_name", "intel").lower()
    return torch.backends.mkl.is_available() and bool(found.get("avx512_f")) and not is_intel


# A linear layer must follow PyTorch's setting for matrix products, and a convolution follows another one. One
# may replace the other only if both settings forbid to round float32 products to a shorter type.
_SETTINGS = [float32_getter("mkldnn", kind) for kind in ("matmul", "conv")]


def _is_exact() -> bool:
    return all(read() in ("none", "ieee", "highest") for read in _SETTINGS)
