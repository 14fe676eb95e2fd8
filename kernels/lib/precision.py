"""The precision of products in the kernels, as `tl.dot` names it."""

from collections.abc import Callable
from functools import partial

import torch

# PyTorch's setting for float32 products. Since PyTorch 2.9 there is a new setting, and reading the older one
# fails once the new one has been used. Every call reads the setting, so the getter is called directly:
# through `torch.backends.cuda.matmul` a read takes 1.7 us.
float32_setting: Callable[[], str] = (
    partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
    if hasattr(torch._C, "_get_fp32_precision_getter")
    else torch.get_float32_matmul_precision
)


def full_precision() -> str:
    """Precision of float32 products that keeps float32's accuracy.

    NVIDIA GPUs compute such a product as three TF32 products, which are exact to about 1e-6. Plain float32
    products do not run on the matrix units: they take 2.5 times the issue slots (95 instead of 39 per score
    in the forward at head 32, compiled for sm_90), and spill. On AMD GPUs only plain products exist.
    """
    return "ieee" if torch.version.hip else "tf32x3"


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of products of `dtype`; for float32 it follows PyTorch's setting for such products."""
    if dtype != torch.float32:
        return "ieee"
    allows_tf32 = not torch.version.hip and float32_setting() in ("tf32", "high", "medium")
    return "tf32" if allows_tf32 else full_precision()
