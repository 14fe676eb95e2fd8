"""Plain attention over one chunk of regions, and the number of regions in a chunk.

Where PyTorch has a fused kernel that returns its `lse`, no scores are written to memory. The `lse` of all
kernels is a natural logarithm, so that a backward may use another kernel than its forward.

Shapes, for `R` regions with `S` queries and `L` keys each: query `(R, S, m, c_qk)`, key `(R, L, m, c_qk)`,
value `(R, L, m, c_v)`, with `m` heads, of any strides. As in the maps, tokens come before heads.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.lib.integers import cdiv
from ...kernels.problem import Padding, RoutedAttention, statistic_dtype
from . import devices, efficient

# On the CPU: the most elements of keys and values that a chunk of the backward gathers, and the most scores
# that a chunk writes to memory, if it writes any: 2 MiB of float32. On two cores of an x86 server, with maps
# of 14 to 80 tokens a side, twice as many elements save up to a tenth of the time of a training step of the
# attention, but need up to a tenth more memory. A chunk also gathers at most as many elements as all keys and
# values have together (the forward twice as many, as below): at YOLO's P5, batch 2, that lowers the peak of a
# training step from 12.5 to 11.2 MiB, and costs no time.
CHUNK_ELEMENTS = 1 << 19
# A chunk of the forward gathers this many times as many elements. That saves up to a sixth of the forward's
# time. A training step needs no more memory for it, because its backward needs still more.
FORWARD_CHUNKS = 2
# On other devices: the most bytes that everything in one chunk may take. Launching one chunk costs as much
# CPU time as a whole small call, and a small chunk leaves most of a GPU idle. On an H100 a training step of
# YOLO's P3 (float16, batch 8) took 1832 us on the GPU and 7.8 ms on the CPU in chunks of 32 MiB, and 1154 us
# and 4.5 ms in chunks of 64 MiB; the reference took 1279 us and 2.3 ms, but 376 MiB. In chunks of 128 MiB
# such a step is cut once.
CHUNK_BYTES = 1 << 27
# With `EFFICIENT`, a chunk may take this many times the bytes of all query, key and value maps, if that is
# more, so that a large batch is not cut into more chunks.
CHUNK_MAPS = 1.0

_FLASH_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Box = tuple[slice, ...]
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


class Kernel(NamedTuple):
    """One implementation of the attention over a chunk.

    Attributes:
        forward: takes query, key, value and the scale; returns the attention `(R, S, m, c_v)` and `lse`, the
            natural logarithm of the softmax's denominator, `(R, m, S)`. If `checked` is None, both are NaN
            in rows that have no softmax: the largest score is infinite, or all scores are minus infinity.
        backward: takes the output's gradient, query, key, value, the output and `lse` of a forward, and the
            scale; returns the gradients of query, key and value.
        checked: a slower forward whose results are NaN in such rows; None if those of `forward` are. If
            `is_softmax` is False for the `lse` that `forward` returned, all chunks must be run again with
            `checked`.
    """

    forward: Forward
    backward: Backward
    checked: Forward | None = None


class SmallGradients(NamedTuple):
    """Gradients that a backward returns besides those of the maps.

    Attributes:
        factor: `(N, G, P, topk)` float32: gradient of `factor`; without a factor, the gradient that a factor
            of 1 would get. None unless asked for.
        padding: gradients of `padding`, float32; None without padding.
    """

    factor: Tensor | None
    padding: Padding[Tensor] | None


def kernel_for(x: Tensor, qk_head_dim: int, v_head_dim: int) -> Kernel:
    """The fastest kernel for tensors like `x` and heads of these sizes.

    On the CPU, forward and backward of PyTorch's flash attention are 1.6 to 2.5 times faster than `PRODUCTS`
    (float32, two cores, maps of 14 to 80 tokens a side).
    """
    if devices.kind(x) == "cpu" and qk_head_dim == v_head_dim:
        return FLASH
    return EFFICIENT if efficient.serves(x, qk_head_dim, v_head_dim) else PRODUCTS


def kernel_of(problem: RoutedAttention[Tensor]) -> Kernel:
    """The fastest kernel for the maps and heads of a problem."""
    return kernel_for(problem.query, problem.qk_head_dim, problem.v_head_dim)


def regions_at_once(
    problem: RoutedAttention[Tensor], kernel: Kernel, *, backward: bool = False, needs_factor: bool = False
) -> int:
    """The number of query regions in a chunk; a region with several graphs counts once for each graph."""
    x, num_heads = problem.query, problem.num_heads // problem.n_graphs
    queries, keys = problem.query_grid.region_tokens, problem.topk * problem.kv_grid.region_tokens
    gathered = keys * num_heads * (problem.qk_head_dim + problem.v_head_dim)
    if devices.kind(x) == "cpu":
        most = min(CHUNK_ELEMENTS, problem.key.numel() + problem.value.numel())
        return most * (1 if backward else FORWARD_CHUNKS) // gathered
    # Bytes of keys and values, of their product with the factor, and of their gradients.
    most, size = CHUNK_BYTES, x.element_size()
    needed = gathered * size * (1 + (problem.factor is not None) + backward)
    if needs_factor:  # the products of keys and values with their gradients
        needed += gathered * _score_size(x)
    if kernel is EFFICIENT:
        maps = x.numel() + problem.key.numel() + problem.value.numel()
        most = max(most, int(CHUNK_MAPS * maps * size))
        if backward:
            needed += efficient.workspace_bytes(queries, num_heads, problem.qk_head_dim)
    else:  # `PRODUCTS` copies keys and values once more, and holds scores in two precisions
        needed += gathered * size + num_heads * queries * keys * _bytes_a_score(x, backward)
    return min(most // needed, efficient.MOST_REGIONS)


def even_step(size: int, most: int) -> int:
    """The step that cuts `size` into parts of at most `most`, as few and as equal as possible; at least 1.

    The parts are equal because the largest part decides how much memory is needed.
    """
    return max(1, cdiv(size, max(1, cdiv(size, max(1, most)))))


def boxes(sizes: Sequence[int], most: int) -> Iterator[Box]:
    """Cuts an array of these sizes into boxes of at most `most` elements, but of at least one.

    A box has no slices for the axes after the last one that is cut: each slice would cost the CPU a
    microsecond wherever the box indexes a tensor.
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
    """PyTorch's flash attention for the CPU, heads before tokens; may be wrong if not `is_softmax(lse)`."""
    out, lse = _FLASH_FORWARD(query, key, value, attn_mask=mask, scale=scale)
    return out, lse


def is_softmax(lse: Tensor) -> bool:
    """Whether all rows of `flash_forward` have a softmax, as far as `lse` shows it.

    PyTorch's kernel returns 0 for some rows without a softmax, so that a model that has diverged would still
    report a finite loss. Therefore this is False if any `lse` is 0, infinite or NaN.
    """
    if lse.numel() == 0:
        return True
    low, high = lse.abs().aminmax()
    return bool(low > 0) and bool(high < math.inf)


def _checked_flash_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = flash_forward(query, key, value, scale)
    if is_softmax(lse):
        return out, lse
    # Attend to values of 1: the output is the sum of a row's probabilities, which is 1 only with a softmax.
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
    """The backward of `flash_forward`; the gradients are of the dtype of `lse`."""
    # In half precision PyTorch's kernel takes 3 to 17 times as long as in float32, these copies included.
    maps = (x.to(lse.dtype) for x in (grad_out, query, key, value, out))
    mask = None if mask is None else mask.to(lse.dtype)
    options = {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask, "scale": scale}
    grad_query, grad_key, grad_value = _FLASH_BACKWARD(*maps, lse, **options)
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
    # The gradients of keys and values are added up over the parts, in the precision of the statistics.
    return grad_scores @ key, grad_key.to(lse.dtype), grad_value.to(lse.dtype)


def _split(rows: Tensor, key: Tensor, *, backward: bool = False) -> tuple[Tensor, ...]:
    """Splits the rows `(R, m, S, c)` along `S`, so that the scores of a part fit the limit of a chunk."""
    n_regions, num_heads, list_length, _ = key.shape
    most = CHUNK_ELEMENTS if devices.kind(key) == "cpu" else CHUNK_BYTES // _bytes_a_score(key, backward)
    return rows.split(max(1, most // (n_regions * num_heads * list_length)), dim=2)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Undoes `_split`."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _scores(scaled_query: Tensor, key: Tensor) -> Tensor:
    """Scores in the precision of the statistics: float32, or float64 for float64.

    The query is scaled before the product, as in the reference: in float16 a product overflows above 65504.
    """
    return (scaled_query @ key.transpose(-2, -1)).to(statistic_dtype(key.dtype))


def _bytes_a_score(x: Tensor, backward: bool) -> int:
    """Bytes of a score in two precisions; in the backward, of a score and a probability, each in two."""
    return (_score_size(x) + x.element_size()) * (1 + backward)


def _score_size(x: Tensor) -> int:
    return statistic_dtype(x.dtype).itemsize


def _forward_of_tokens(forward: Forward) -> Forward:
    """Turns a forward that takes and returns heads before tokens into one with tokens before heads."""

    def transposed(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = forward(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale)
        return out.transpose(1, 2), lse

    return transposed


def _backward_of_tokens(backward: Backward) -> Backward:
    """Turns a backward that takes and returns heads before tokens into one with tokens before heads."""

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
