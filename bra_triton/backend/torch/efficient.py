"""PyTorch's memory-efficient attention for NVIDIA GPUs, called directly to get its log-sum-exp.

`scaled_dot_product_attention` does not return the log-sum-exp, and its backward adds up the queries' gradient
atomically, in an order that changes. Called directly, with the keys in one split, the backward uses no
atomics. Shapes are as in `chunks`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention

from . import devices

# The most regions in one call: they are the third axis of the launch grid.
MOST_REGIONS = 2**16 - 1
# The backward keeps the queries' gradient in float32 tiles of at least this side, even for a region of one
# query and a head of 8 channels.
_TILE_SIDE = 64
# The kernels load this many bytes at once. The backward reads `lse` in whole blocks of `_LSE_BLOCK` rows.
_ALIGNMENT_BYTES, _LSE_BLOCK = 16, 32
_FORWARD = torch.ops.aten._efficient_attention_forward
_BACKWARD = torch.ops.aten._efficient_attention_backward


def serves(x: Tensor, qk_head_dim: int, v_head_dim: int) -> bool:
    """Whether the kernels support tensors like `x` with heads of these sizes.

    PyTorch knows which GPUs and dtypes they support; it also answers no if its user has turned them off.
    """
    if devices.kind(x) != "cuda":  # AMD's backward cannot be told to add up in a fixed order
        return False
    if any(head_dim * x.element_size() % _ALIGNMENT_BYTES for head_dim in (qk_head_dim, v_head_dim)):
        return False
    query, value = (x.new_empty(1, 1, 1, head_dim) for head_dim in (qk_head_dim, v_head_dim))
    return can_use_efficient_attention(SDPAParams(query, query, value, None, 0.0, False, False))


def workspace_bytes(query_tokens: int, num_heads: int, qk_head_dim: int) -> int:
    """Bytes that the backward of one region needs besides its results."""
    tiles = math.ceil(query_tokens / _TILE_SIDE) * math.ceil(qk_head_dim / _TILE_SIDE)
    return num_heads * tiles * _TILE_SIDE**2 * torch.float32.itemsize


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention `(R, S, m, c_v)`, contiguous, and `lse` `(R, m, S)`; see `chunks.Kernel`.

    `mask`, `(R, m, S, L)`, is added to the scores: 0, or `hidden(dtype)` for a key that a query must not see.
    The kernels load it as `aligned_length` says.
    """
    query, key, value = (_aligned(x) for x in (query, key, value))
    # No sequences of different lengths, no dropout, no causal mask; True asks for `lse`.
    out, lse, *_ = _FORWARD(query, key, value, mask, *(None,) * 4, 0.0, 0, True, scale=scale)
    lse = lse[..., : query.shape[1]]
    # If all scores of a row are minus infinity, the kernel returns 0 as the row's output and `lse`. A row
    # whose denominator is 1 has an `lse` of 0, too; the first score of a row tells the two cases apart.
    # Nothing here waits for the GPU.
    first_score = (query * key[:, :1]).sum(-1).transpose(1, 2)
    told = torch.where(lse == 0, first_score, lse)  # 0 times `told` is NaN in rows without a softmax
    if mask is not None:  # the row's softmax is over hidden keys: no key that it may see has a finite score
        told = told.masked_fill(lse < hidden(query.dtype) / 2, math.nan)
    return out.add_(told.transpose(1, 2).unsqueeze(-1), alpha=0), lse.add(told, alpha=0)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; `lse` is `(R, m, S)`, `mask` that of the forward."""
    n_tokens, n_keys = query.shape[1], key.shape[1]
    missing = -n_tokens % _LSE_BLOCK  # an `lse` of infinity makes the probabilities of these rows 0
    blocks = F.pad(lse, (0, missing), value=math.inf) if missing else lse.contiguous()
    query, key, value = (_aligned(x) for x in (query, key, value))
    no_seed = lse.new_empty(0, dtype=torch.int64)
    numbers: tuple[Any, ...] = (None, None, n_tokens, n_keys, blocks, 0.0, no_seed, no_seed, 0, False)
    grad_query, grad_key, grad_value, _ = _BACKWARD(
        *(_aligned(grad_out.contiguous()), query, key, value, mask, _aligned(out.contiguous())),
        *numbers,
        scale=scale,
        num_splits_key=1,
    )
    return grad_query, grad_key, grad_value


def hidden(dtype: torch.dtype) -> float:
    """The number that a mask adds to the score of a key that must not be seen: low enough for weights of 0.

    It is finite: where all keys of a step are hidden the kernels would subtract infinity from infinity.
    """
    return max(torch.finfo(dtype).min, -1e30)


def aligned_length(keys: int, dtype: torch.dtype) -> int:
    """The distance between two rows of a mask for so many keys: the kernels load 16 bytes at once."""
    step = _ALIGNMENT_BYTES // dtype.itemsize
    return math.ceil(keys / step) * step


def _aligned(x: Tensor) -> Tensor:
    """`x` if the kernels can read it in place, at its address and with its strides; otherwise a copy."""
    regions, tokens, heads, channels = x.stride()
    # A bitwise or of the address and of the strides in bytes: it is a multiple of 16 only if each of them is.
    lowest = x.data_ptr() | (regions | tokens | heads) * x.element_size()
    if channels == 1 and lowest % _ALIGNMENT_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
