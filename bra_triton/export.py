"""Whether PyTorch is recording a graph to be taken elsewhere, where this package's operators do not exist."""

import torch


def being_exported() -> bool:
    """True inside `torch.jit.trace`, `torch.export` and ONNX export, not inside `torch.compile`."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_eager() -> bool:
    """True where operations run as they are called, and no graph of them is recorded, to whatever end."""
    return not torch.compiler.is_compiling() and not torch._C._is_tracing()
