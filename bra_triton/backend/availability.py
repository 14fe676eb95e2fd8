"""Whether a backend can serve, asked before it is imported: the same predicate chooses and explains."""

import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from ..spec import AttentionSpec

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_HEAD_DIM = 256
# Compiled for 7.5 every attention kernel spills hundreds of registers.
MIN_CAPABILITY = (8, 0)
# One program of the routing kernel holds the logits of all regions in registers.
MAX_N_WIN = 64
# Triton 3.6 dies of a failed assertion where addresses of map and padding are selected, compiled for gfx942;
# 3.8 compiles it. Versions between were not tried.
AMD_PADDING_TRITON = (3, 8)


def always(qkv: Tensor, spec: AttentionSpec) -> None:
    """Serves everything."""


def why_not_triton(qkv: Tensor, spec: AttentionSpec) -> str | None:
    """Why the Triton kernels cannot serve, or None."""
    if not TRITON_IS_INSTALLED:
        return "Triton is not installed (pip install triton; Linux only)"
    if qkv.device.type == "cpu" and not _interpreted():
        return "tensors on the CPU need TRITON_INTERPRET=1 (for tests; slow)"
    if qkv.device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {qkv.device.type!r}"
    if qkv.device.type == "cuda" and not torch.version.hip and _capability(qkv.device) < MIN_CAPABILITY:
        return f"the kernels need compute capability 8.0 or later, {qkv.device} has {_capability(qkv.device)}"
    if torch.version.hip and _triton_version() < AMD_PADDING_TRITON and _is_padded(qkv, spec):
        return (
            f"for AMD, Triton before 3.8 cannot compile padded maps: sides must be multiples of "
            f"n_win={spec.n_win}, got {tuple(qkv.shape[1:3])}"
        )
    if qkv.dtype not in TRITON_DTYPES:
        return f"dtype must be float32, float16 or bfloat16, got {qkv.dtype}"
    if max(spec.qk_head_dim, spec.v_head_dim) > MAX_HEAD_DIM:
        return (
            f"heads must be at most {MAX_HEAD_DIM} wide, got {spec.qk_head_dim} (queries and keys) and "
            f"{spec.v_head_dim} (values); raise num_heads"
        )
    if spec.n_win > MAX_N_WIN:
        return f"n_win must be at most {MAX_N_WIN}, got {spec.n_win}"
    if qkv.shape[1] * qkv.shape[2] >= 2**31:
        return f"a map must have fewer than 2**31 tokens, got shape {tuple(qkv.shape)}"
    return None


def _is_padded(qkv: Tensor, spec: AttentionSpec) -> bool:
    return bool(qkv.shape[1] % spec.n_win or qkv.shape[2] % spec.n_win)


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
