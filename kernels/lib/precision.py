"""The precision of products in the kernels, as `tl.dot` names it."""

from collections.abc import Callable
from functools import partial

import torch


def float32_getter(library: str, kind: str) -> Callable[[], str]:
    """A function that reads PyTorch's setting for float32 products.

    Since PyTorch 2.9 there is a setting for each `library` ("cuda", "mkldnn") and `kind` of product
    ("matmul", "conv"), and reading the older, common one fails once a new one has been used. Every call reads
    the setting, so this is PyTorch's own getter: through `torch.backends.cuda.matmul` a read takes 1.7 us.
    """
    getter = getattr(torch._C, "_get_fp32_precision_getter", None)
    return torch.get_float32_matmul_precision if getter is None else partial(getter, library, kind)


float32_setting = float32_getter("cuda", "matmul")


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
