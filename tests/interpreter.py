"""Where there is no GPU the Triton kernels run under the interpreter; that is decided before Triton loads.

It stands outside `conftest.py`: of several such files, an import finds the one that pytest loaded last.
"""

import importlib.util
import os
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def watch_overflows(watches):
    """Whether the interpreter looks for integers that overflow, or lets them wrap as a GPU does."""
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=watches)


def _quicken():
    """Takes from the interpreter what more than half of its time goes to.

    It computes every sum and product of integers again in 64 bits, and at every call of a device function
    replaces the language's functions, which a launch has replaced already.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    watch_overflows(False)
    patch_and_call = InterpretedFunction.__call__

    def call(function, *arguments, **options):
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return patch_and_call(function, *arguments, **options)
        return function.rewrite()(*arguments, **options)

    InterpretedFunction.__call__ = call


if INTERPRETED and importlib.util.find_spec("triton"):
    _quicken()
