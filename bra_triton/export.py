"""Tells whether PyTorch records a graph, and whether it is for use without this package's operators."""

import torch


def being_exported() -> bool:
    """True inside `torch.jit.trace`, `torch.export` and ONNX export, not inside `torch.compile`."""
    # Not `torch.compiler.is_exporting()`, which returns this flag: the compiler of PyTorch 2.8 takes that for
    # True in every graph.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def is_eager() -> bool:
    """True if operations run when they are called; False while a graph of them is recorded, by any tool."""
    return not torch.compiler.is_compiling() and not torch._C._is_tracing()
