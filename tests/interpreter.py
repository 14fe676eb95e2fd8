"""Where there is no GPU the Triton kernels run under the interpreter; that is decided before Triton loads.

It stands outside `conftest.py`: of several such files, an import finds the one that pytest loaded last.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
