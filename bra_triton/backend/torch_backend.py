"""The torch backend: any device, any floating dtype, memory linear in the map.

Regions are processed in chunks small enough for the cache: a chunk's routed keys and values are gathered,
attended to and dropped; the backward gathers them again. The functions of this file are what every backend
has.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from ..kernels.region_grid import RegionGrid
from ..routing import select_topk
from ..spec import AttentionSpec
from . import chunk_attention

# Elements of a chunk's gathered keys and values. Measured on two cores of an x86 server over maps of 14 to
# 80 tokens a side: 2**19 (2 MiB of float32) is within 8 % of the best of 2**17 to 2**22 everywhere.
CHUNK_ELEMENTS = 1 << 19


def region_routing(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Routes regions by their mean queries and keys.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`, sides multiples of `n_win`.
        spec: what is computed.

    Returns:
        `r_weight` (float32; float64 for float64) and `r_idx` (int32), both `(N, P, topk)`.
    """
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    query, key = region_means(qkv, spec, dtype).split(spec.qk_dim, dim=-1)
    top_logits, r_idx = select_topk((query * spec.scale) @ key.transpose(-2, -1), spec.topk)
    return top_logits.softmax(dim=-1), r_idx.int()


def region_means(qkv: Tensor, spec: AttentionSpec, dtype: torch.dtype | None = None) -> Tensor:
    """Mean query and key of every region: `(N, P, 2*qk_dim)`."""
    qk = qkv[..., : 2 * spec.qk_dim]
    tokens = rearrange(qk, "n (j h) (i w) c -> n j h i w c", j=spec.n_win, i=spec.n_win)
    # Columns first: each of the two sums then runs along memory that the other left dense.
    return tokens.mean(4, dtype=dtype).mean(2).flatten(1, 2)


def attention_forward(qkv: Tensor, r_idx: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attends from every region to the regions it chose.

    Args:
        qkv: `(N, H, W, 2*qk_dim + dim)`, sides multiples of `n_win`.
        r_idx: `(N, P, topk)` int32, entries in `[0, P)`.
        spec: what is computed.

    Returns:
        `out` `(N, H, W, dim)` of the dtype of `qkv`, contiguous, and `lse` `(N, num_heads, P, S)`: the
        logarithm of the softmax's denominator (float64 for float64, else float32).
    """
    regions = _to_regions(qkv, spec)
    n_rows, n_tokens = regions.shape[:2]
    out = regions.new_empty(n_rows, n_tokens, spec.dim)
    lse = out.new_empty(n_rows, spec.num_heads, n_tokens, dtype=_statistic_dtype(qkv.dtype))
    for chunk, query, key, value in _chunks(regions, r_idx, spec):
        rows, tokens = chunk
        chunk_out, lse[rows, :, tokens] = chunk_attention.forward(query, key, value, spec.scale)
        out[chunk] = _merge_heads(chunk_out)
    lse = rearrange(lse, "(n p) m s -> n m p s", p=spec.n_win**2)
    return _from_regions(out, qkv, spec), lse.contiguous()


def attention_backward(
    grad_out: Tensor, qkv: Tensor, r_idx: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> Tensor:
    """Gradient of the packed projection; `qkv` to `lse` as in `attention_forward`.

    Args:
        grad_out: `(N, H, W, dim)`.
        qkv: the forward's.
        r_idx: the forward's.
        out: the forward's.
        lse: the forward's.
        spec: what is computed.

    Returns:
        `(N, H, W, 2*qk_dim + dim)`, contiguous; the same bits for the same input.
    """
    regions = _to_regions(qkv, spec)
    out_regions, grad_regions = _to_regions(out, spec), _to_regions(grad_out, spec)
    lse = rearrange(lse, "n m p s -> (n p) m s")
    # Half precision adds up to P*topk terms a key here: accumulate them in float32.
    grad = torch.zeros_like(regions, dtype=_statistic_dtype(qkv.dtype))
    grad_query, grad_key, grad_value = grad.split([spec.qk_dim, spec.qk_dim, spec.dim], dim=-1)
    flat_idx = _flat_index(r_idx)
    for chunk, query, key, value in _chunks(regions, r_idx, spec):
        rows, tokens = chunk
        chunk_grad_out = _split_heads(grad_regions[chunk], spec.num_heads)
        chunk_out = _split_heads(out_regions[chunk], spec.num_heads)
        chunk_query, chunk_key, chunk_value = chunk_attention.backward(
            chunk_grad_out, query, key, value, chunk_out, lse[rows, :, tokens], spec.scale
        )
        grad_query[chunk] = _merge_heads(chunk_query).to(grad.dtype)
        for total, part in ((grad_key, chunk_key), (grad_value, chunk_value)):
            addends = rearrange(part, "r m (t s) c -> (r t) s (m c)", t=spec.topk)
            _add_rows(total, flat_idx[rows].flatten(), addends.to(grad.dtype))
    return _from_regions(grad.to(qkv.dtype), qkv, spec)


def _chunks(
    regions: Tensor, r_idx: Tensor, spec: AttentionSpec
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor]]:
    """Chunks of R regions and s of their tokens, with all that their queries attend to.

    Yields the slices of regions and tokens, queries `(R, m, s, c)`, and gathered keys and values
    `(R, m, topk*S, c)`. Regions are split only where a single one's scores pass the chunk's size.
    """
    n_rows, n_tokens = regions.shape[:2]
    flat_idx = _flat_index(r_idx)
    query, key_value = regions.split([spec.qk_dim, spec.qk_dim + spec.dim], dim=-1)
    per_row = spec.topk * n_tokens * (spec.qk_dim + spec.dim)
    token_step = n_tokens
    if not chunk_attention.is_fused(regions, spec.qk_head_dim, spec.v_head_dim):
        scores_per_token = spec.num_heads * spec.topk * n_tokens
        token_step = min(n_tokens, max(1, CHUNK_ELEMENTS // scores_per_token))
        per_row += scores_per_token * token_step
    step = max(1, CHUNK_ELEMENTS // per_row)
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        gathered = key_value.index_select(0, flat_idx[rows].flatten())
        gathered = gathered.view(-1, spec.topk * n_tokens, spec.qk_dim + spec.dim)
        key, value = gathered.split([spec.qk_dim, spec.dim], dim=-1)
        key, value = _split_heads(key, spec.num_heads), _split_heads(value, spec.num_heads)
        for first in range(0, n_tokens, token_step):
            chunk = (rows, slice(first, min(first + token_step, n_tokens)))
            yield chunk, _split_heads(query[chunk], spec.num_heads), key, value


def _flat_index(r_idx: Tensor) -> Tensor:
    """Rows of all images' regions: `(N, P, topk)` to `(N*P, topk)`."""
    batch, n_regions, _ = r_idx.shape
    first = torch.arange(batch, device=r_idx.device, dtype=r_idx.dtype) * n_regions
    return (r_idx + first[:, None, None]).flatten(0, 1)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """`total[index] += rows` in a fixed order."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        # index_add_ uses atomics there; accumulating index_put_ sorts.
        total.index_put_((index.long(),), rows, accumulate=True)


def _to_regions(x: Tensor, spec: AttentionSpec) -> Tensor:
    return rearrange(x, "n (j h) (i w) c -> (n j i) (h w) c", j=spec.n_win, i=spec.n_win).contiguous()


def _from_regions(regions: Tensor, like: Tensor, spec: AttentionSpec) -> Tensor:
    grid = RegionGrid.of_windows(like.shape[1], like.shape[2], spec.n_win)
    return rearrange(
        regions,
        "(n j i) (h w) c -> n (j h) (i w) c",
        j=spec.n_win,
        i=spec.n_win,
        h=grid.region_height,
    ).contiguous()


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "r s (m c) -> r m s c", m=num_heads)


def _merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "r m s c -> r s (m c)")


def _statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
