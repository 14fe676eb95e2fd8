"""Turns Triton's interpreter on if there is no GPU. Triton reads the setting when it is imported.

This code is not in `conftest.py`, because tests import it: there are several files of that name, and an
import finds the one that pytest loaded last.
"""

import importlib.util
import os
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def watch_overflows(watches):
    """Sets whether the interpreter checks integers for overflow; otherwise they wrap as on a GPU."""
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=watches)


def _quicken():
    """Switches off two steps that take more than half of the interpreter's time.

    The interpreter computes every sum and product of integers again in 64 bits. And at every call of a device
    function it replaces the functions of `triton.language`, although the launch has already replaced them.
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
