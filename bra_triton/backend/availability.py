"""Decides whether the Triton kernels can serve a call, without importing Triton."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence

import torch

from ..call import Request
from ..kernels.grid import RegionGrid

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_HEAD_DIM = 256
# Compiled for compute capability 7.5, every attention kernel spills hundreds of registers.
MIN_CAPABILITY = (8, 0)
# With `topk` above 256, a program of the routing kernel holds the logits of one query region with all key
# regions in registers.
MAX_ROUTED_REGIONS = 64 * 64
# The first Triton version that compiles the kernels for padded maps on AMD. Compiling for gfx942, Triton 3.6
# aborts with a failed assertion where a kernel selects between addresses of the map and of the padding;
# Triton 3.8 compiles it. The versions in between were not tried.
AMD_PADDING_TRITON = (3, 8)


def why_not_triton(request: Request) -> str | None:
    """The reason why the Triton kernels cannot serve the call, or None if they can."""
    x, head_dims, grids = request.like, request.head_dims, request.grids
    if not TRITON_IS_INSTALLED:
        return "Triton is not installed (pip install triton; Linux only)"
    if x.device.type == "cpu" and not _interpreted():
        return "tensors on the CPU need TRITON_INTERPRET=1 (for tests; slow)"
    if x.device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {x.device.type!r}"
    if x.device.type == "cuda" and not torch.version.hip and _capability(x.device) < MIN_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, {x.device} has {_capability(x.device)}"
    if torch.version.hip and _triton_version() < AMD_PADDING_TRITON and any(g.is_padded for g in grids):
        return f"for AMD, Triton before 3.8 cannot compile padded maps, got {_sizes(grids)}"
    if x.dtype not in TRITON_DTYPES:
        return f"dtype must be float32, float16 or bfloat16, got {x.dtype}"
    if max(head_dims) > MAX_HEAD_DIM:
        return (
            f"heads must be at most {MAX_HEAD_DIM} wide, got {head_dims[0]} (queries and keys) and "
            f"{head_dims[1]} (values); raise num_heads"
        )
    if request.routes and max(grid.n_regions for grid in grids) > MAX_ROUTED_REGIONS:
        return f"the router takes at most {MAX_ROUTED_REGIONS} regions, got {_sizes(grids)}; lower n_win"
    if max(grid.height * grid.width for grid in grids) >= 2**31:
        return f"a map must have fewer than 2**31 tokens, got {_sizes(grids)}"
    return None


def _sizes(grids: Sequence[RegionGrid]) -> str:
    return " and ".join(f"{g.height} x {g.width} tokens in {g.rows} x {g.columns} regions" for g in grids)


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
