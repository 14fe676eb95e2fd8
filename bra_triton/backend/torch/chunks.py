"""Plain attention over one chunk of regions: fused where PyTorch has a fused kernel that hands out its lse.

Shapes: query `(R, m, S, c_qk)`, key `(R, m, L, c_qk)`, value `(R, m, L, c_v)`, of any strides.
"""

import math

import torch
from torch import Tensor

# Elements of a chunk's gathered keys and values, and of its scores where they reach memory: 2 MiB of float32.
# On two cores of an x86 server, maps of 14 to 80 tokens a side, twice and four times as many save up to a
# sixth of a step's time, but twice as many already cost up to a fourth more memory.
CHUNK_ELEMENTS = 1 << 19

_FUSED_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def is_fused(x: Tensor, qk_head_dim: int, v_head_dim: int) -> bool:
    """Whether a fused kernel serves tensors like `x`: then no scores reach memory.

    On the CPU, forward and backward of PyTorch's flash attention; measured 1.6 to 2.5 times faster than
    the products below (float32, two cores, maps of 14 to 80 tokens a side).
    """
    return x.device.type == "cpu" and qk_head_dim == v_head_dim


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention `(R, m, S, c_v)` and the natural logarithm of its softmax's denominator `(R, m, S)`.

    Both are NaN where there is no softmax: an infinite score leads, or all scores are minus infinity.
    """
    if is_fused(query, query.shape[-1], value.shape[-1]):
        out, lse = _FUSED_FORWARD(query, key, value, scale=scale)
        low, high = lse.abs().aminmax()
        if low > 0 and high < math.inf:
            return out, lse
        # PyTorch's kernel may have made 0 of what is no softmax, and a model that has diverged would report a
        # loss. There the probabilities do not add up to 1.
        sums, _ = _FUSED_FORWARD(query, key, torch.ones_like(value), scale=scale)
        is_none = ~(sums[..., 0] > 0.5)
        return out.masked_fill(is_none[..., None], math.nan), lse.masked_fill(is_none, math.nan)
    parts = [_forward(part, key, value) for part in _split(query * scale, key)]
    out, lse = (_joined(each) for each in zip(*parts, strict=True))
    return out, lse


def _forward(scaled_query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(scaled_query, key)
    lse = scores.logsumexp(dim=-1)
    lse.masked_fill_(lse.isinf(), math.nan)
    probs = scores.sub_(lse[..., None]).exp_()
    return probs.to(value.dtype) @ value, lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from the output and `lse` that `forward` gave."""
    if is_fused(query, query.shape[-1], value.shape[-1]):
        return _FUSED_BACKWARD(
            grad_out, query, key, value, out, lse, dropout_p=0.0, is_causal=False, scale=scale
        )
    delta = (grad_out * out).sum(-1, keepdim=True, dtype=lse.dtype)
    rows = (_split(x, key) for x in (grad_out, query * scale, lse[..., None], delta))
    parts = [_backward(key, value, *part) for part in zip(*rows, strict=True)]
    grad_query, grad_key, grad_value = zip(*parts, strict=True)
    return (
        _joined(grad_query) * scale,
        sum(grad_key[1:], grad_key[0]),
        sum(grad_value[1:], grad_value[0]),
    )


def _backward(
    key: Tensor, value: Tensor, grad_out: Tensor, scaled_query: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    probs = _scores(scaled_query, key).sub_(lse).exp_()
    grad_scores = (grad_out @ value.transpose(-2, -1)).to(lse.dtype).sub_(delta).mul_(probs)
    grad_scores, probs = grad_scores.to(scaled_query.dtype), probs.to(scaled_query.dtype)
    grad_key, grad_value = grad_scores.transpose(-2, -1) @ scaled_query, probs.transpose(-2, -1) @ grad_out
    # Of more than one part they are added up, in the precision of the statistics.
    return grad_scores @ key, grad_key.to(lse.dtype), grad_value.to(lse.dtype)


def _split(rows: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """The rows `(R, m, S, c)` in parts whose scores are no more than a chunk's elements."""
    n_regions, num_heads, list_length, _ = key.shape
    return rows.split(max(1, CHUNK_ELEMENTS // (n_regions * num_heads * list_length)), dim=2)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Undoes `_split`."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _scores(scaled_query: Tensor, key: Tensor) -> Tensor:
    """Scores in the precision of the statistics: float32, or float64 for float64.

    The query comes scaled, as in the reference: float16 would overflow at products of 65504.
    """
    dtype = torch.promote_types(scaled_query.dtype, torch.float32)
    return (scaled_query @ key.transpose(-2, -1)).to(dtype)
