"""Plain attention over one chunk of regions, and how many regions that is.

Where PyTorch has a fused kernel that hands out its lse, no scores reach memory. All kernels give the natural
logarithm, so that the backward need not take the one that the forward took.

Shapes: query `(R, S, m, c_qk)`, key `(R, L, m, c_qk)`, value `(R, L, m, c_v)`, of any strides: tokens before
heads, as maps have them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.grid import cdiv
from ...kernels.problem import RoutedAttention, statistic_dtype
from . import devices, efficient

# On the CPU, elements of the keys and values that a chunk of the backward gathers, and of a chunk's scores
# where they reach memory: 2 MiB of float32. On two cores of an x86 server, maps of 14 to 80 tokens a side,
# twice as many take up to a tenth less time for a step of the attention, but up to a tenth more memory.
CHUNK_ELEMENTS = 1 << 19
# A chunk of the forward gathers this many times as many. That saves up to a sixth of its time, and costs a
# training no memory, as the backward needs more.
FORWARD_CHUNKS = 2
# Elsewhere, bytes of all that a chunk takes. Launching one takes the CPU as long as a small call, and a small
# one leaves most of a GPU idle: on an H100 a step of P3 (float16, batch 8) took 1832 us of the GPU and 7.8 ms
# of the caller's time in chunks of 32 MiB, and 1154 us and 4.5 ms in chunks of 64 MiB; the reference took
# 1279 us and 2.3 ms, but 376 MiB. In chunks of 128 MiB such a step is cut once.
CHUNK_BYTES = 1 << 27
# A chunk may take more, this many times what the maps take, so that large batches are not cut finer.
CHUNK_MAPS = 1.0

_FLASH_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Box = tuple[slice, ...]
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


class Kernel(NamedTuple):
    """One way to attend.

    Attributes:
        forward: from query, key, value and the scale: attention `(R, S, m, c_v)` and the natural logarithm of
            its softmax's denominator `(R, m, S)`. Without `checked`, both are NaN where there is no softmax:
            an infinite score leads, or all scores are minus infinity.
        backward: from the output's gradient, query, key, value, and the output and `lse` that a forward gave:
            gradients of query, key and value.
        checked: a slower forward that keeps this promise: all chunks have to be run again with it unless
            `is_softmax` of what `forward` gave. None where `forward` keeps it.
    """

    forward: Forward
    backward: Backward
    checked: Forward | None = None


def kernel_for(x: Tensor, qk_head_dim: int, v_head_dim: int) -> Kernel:
    """The fastest that takes heads of these sizes, of tensors like `x`.

    On the CPU, forward and backward of PyTorch's flash attention are 1.6 to 2.5 times faster than the
    products (float32, two cores, maps of 14 to 80 tokens a side).
    """
    if devices.kind(x) == "cpu" and qk_head_dim == v_head_dim:
        return FLASH
    return EFFICIENT if efficient.serves(x, qk_head_dim, v_head_dim) else PRODUCTS


def kernel_of(problem: RoutedAttention[Tensor]) -> Kernel:
    """`kernel_for` the maps and heads of a problem."""
    return kernel_for(problem.query, problem.qk_head_dim, problem.v_head_dim)


def regions_at_once(
    problem: RoutedAttention[Tensor], kernel: Kernel, *, backward: bool = False, needs_factor: bool = False
) -> int:
    """How many query regions, of one graph each, make a chunk."""
    x, num_heads = problem.query, problem.num_heads // problem.n_graphs
    queries, keys = problem.query_grid.region_tokens, problem.topk * problem.kv_grid.region_tokens
    gathered = keys * num_heads * (problem.qk_head_dim + problem.v_head_dim)
    if devices.kind(x) == "cpu":
        return CHUNK_ELEMENTS * (1 if backward else FORWARD_CHUNKS) // gathered
    # Keys and values, their product with the factor, and their gradients.
    most, size = CHUNK_BYTES, x.element_size()
    needed = gathered * size * (1 + (problem.factor is not None) + backward)
    if needs_factor:  # products of keys and their gradients, and the same of values
        needed += gathered * _score_size(x)
    if kernel is EFFICIENT:
        maps = x.numel() + problem.key.numel() + problem.value.numel()
        most = max(most, int(CHUNK_MAPS * maps * size))
        if backward:
            needed += efficient.workspace_bytes(queries, num_heads, problem.qk_head_dim)
    else:  # the products copy keys and values once more, and hold scores in two precisions
        needed += gathered * size + num_heads * queries * keys * _bytes_a_score(x, backward)
    return min(most // needed, efficient.MOST_REGIONS)


def even_step(size: int, most: int) -> int:
    """The step that cuts a size evenly into as few parts as `most` allows; 1 at least.

    Evenly, as the largest part decides how much memory is taken.
    """
    return max(1, cdiv(size, max(1, cdiv(size, max(1, most)))))


def boxes(sizes: Sequence[int], most: int) -> Iterator[Box]:
    """Cuts a space of these sizes into boxes of at most `most` cells, but of one at least.

    Axes after the last that is cut are left out: each costs the CPU a microsecond wherever a box is taken.
    """
    cuts: list[list[slice]] = []
    for size in reversed(sizes):
        step = even_step(size, most)
        if cuts or step < size:
            cuts.insert(0, [slice(at, min(at + step, size)) for at in range(0, size, step)])
        most //= max(1, size)
    return itertools.product(*cuts) if math.prod(sizes) else iter(())


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention for the CPU, heads before tokens; wrong where not `is_softmax(lse)`."""
    out, lse = _FLASH_FORWARD(query, key, value, attn_mask=mask, scale=scale)
    return out, lse


def is_softmax(lse: Tensor) -> bool:
    """Whether `flash_forward` has found a softmax in all rows, as far as `lse` tells.

    PyTorch's kernel makes 0 of some that have none, and a model that has diverged would report a loss.
    """
    if lse.numel() == 0:
        return True
    low, high = lse.abs().aminmax()
    return bool(low > 0) and bool(high < math.inf)


def _checked_flash_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = flash_forward(query, key, value, scale)
    if is_softmax(lse):
        return out, lse
    # Where there is none the probabilities do not add up to 1.
    sums, _ = _FLASH_FORWARD(query, key, torch.ones_like(value), scale=scale)
    is_none = ~(sums[..., 0] > 0.5)
    return out.masked_fill(is_none[..., None], math.nan), lse.masked_fill(is_none, math.nan)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `flash_forward`."""
    options = {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask, "scale": scale}
    grad_query, grad_key, grad_value = _FLASH_BACKWARD(grad_out, query, key, value, out, lse, **options)
    return grad_query, grad_key, grad_value


def _products_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    parts = [_forward_part(part, key, value) for part in _split(query * scale, key)]
    out, lse = (_joined(each) for each in zip(*parts, strict=True))
    return out, lse


def _forward_part(scaled_query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(scaled_query, key)
    lse = scores.logsumexp(dim=-1)
    lse.masked_fill_(lse.isinf(), math.nan)
    probs = scores.sub_(lse[..., None]).exp_()
    return probs.to(value.dtype) @ value, lse


def _products_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (grad_out * out).sum(-1, keepdim=True, dtype=lse.dtype)
    rows = (_split(x, key, backward=True) for x in (grad_out, query * scale, lse[..., None], delta))
    parts = [_backward_part(key, value, *part) for part in zip(*rows, strict=True)]
    grad_query, grad_key, grad_value = zip(*parts, strict=True)
    return (
        _joined(grad_query) * scale,
        sum(grad_key[1:], grad_key[0]),
        sum(grad_value[1:], grad_value[0]),
    )


def _backward_part(
    key: Tensor, value: Tensor, grad_out: Tensor, scaled_query: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    probs = _scores(scaled_query, key).sub_(lse).exp_()
    grad_scores = (grad_out @ value.transpose(-2, -1)).to(lse.dtype).sub_(delta).mul_(probs)
    grad_scores, probs = grad_scores.to(scaled_query.dtype), probs.to(scaled_query.dtype)
    grad_key, grad_value = grad_scores.transpose(-2, -1) @ scaled_query, probs.transpose(-2, -1) @ grad_out
    # Of more than one part they are added up, in the precision of the statistics.
    return grad_scores @ key, grad_key.to(lse.dtype), grad_value.to(lse.dtype)


def _split(rows: Tensor, key: Tensor, *, backward: bool = False) -> tuple[Tensor, ...]:
    """The rows `(R, m, S, c)` in parts whose scores are no more than a chunk's."""
    n_regions, num_heads, list_length, _ = key.shape
    most = CHUNK_ELEMENTS if devices.kind(key) == "cpu" else CHUNK_BYTES // _bytes_a_score(key, backward)
    return rows.split(max(1, most // (n_regions * num_heads * list_length)), dim=2)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Undoes `_split`."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _scores(scaled_query: Tensor, key: Tensor) -> Tensor:
    """Scores in the precision of the statistics: float32, or float64 for float64.

    The query comes scaled, as in the reference: float16 would overflow at products of 65504.
    """
    return (scaled_query @ key.transpose(-2, -1)).to(statistic_dtype(key.dtype))


def _bytes_a_score(x: Tensor, backward: bool) -> int:
    """Of scores or probabilities in two precisions, and in the backward of both."""
    return (_score_size(x) + x.element_size()) * (1 + backward)


def _score_size(x: Tensor) -> int:
    return statistic_dtype(x.dtype).itemsize


def _forward_of_tokens(forward: Forward) -> Forward:
    """The forward of a function that takes and gives heads before tokens."""

    def transposed(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = forward(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale)
        return out.transpose(1, 2), lse

    return transposed


def _backward_of_tokens(backward: Backward) -> Backward:
    """The backward of a function that takes and gives heads before tokens."""

    def transposed(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        gradients = backward(grad_out, query, key, value, out, lse, scale)
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in gradients)
        return grad_query, grad_key, grad_value

    return transposed


FLASH = Kernel(
    _forward_of_tokens(flash_forward),
    _backward_of_tokens(flash_backward),
    checked=_forward_of_tokens(_checked_flash_forward),
)
EFFICIENT = Kernel(efficient.forward, efficient.backward)
PRODUCTS = Kernel(_forward_of_tokens(_products_forward), _backward_of_tokens(_products_backward))
