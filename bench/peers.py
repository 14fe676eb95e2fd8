"""The attentions that the kernels are measured against, as functions of one packed projection.

All take `qkv` `(N, H, W, 3*dim)` and return `(N, H, W, dim)`. No peer has LePE or projections. If regions do
not divide the map, `fused`, `reference` and `torch` get the padding as a separate argument; `gather` and
`flex` copy the map into a padded one first, and this time counts; `dense` needs no padding.

FlexAttention divides the scores into blocks of queries by keys, whose sides are multiples of 128 on a GPU. It
skips blocks that are masked entirely, and evaluates the mask in blocks that are masked partly. Therefore
`flex` reorders the tokens region by region: a block then holds few regions, and if regions are large most
blocks are skipped. The reordering reads the packed projection and writes queries, keys and values in the
layout of FlexAttention; an attention that cannot read them in place needs such a copy anyway. The routing
changes in every step, so every step must build the mask anew; see `block_mask`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bra_triton import functional
from bra_triton.backend.torch.regions import whole_map
from bra_triton.bench.problems import Problem

BLOCK = 128
NAMES = ("fused", "reference", "gather", "flex", "dense", "torch")


class Peer(NamedTuple):
    """One way to compute the attention."""

    includes: str  # what a call includes, in words
    attend: Callable[[Tensor], Tensor]  # the function of `qkv` that is timed


def peers_for(problem: Problem, backend: str, padding: Tensor | None = None) -> dict[str, Peer]:
    """The peers by name; `fused` runs on `backend`. If this is not `"torch"`, there is a peer `torch`, too.

    `padding` `(3*dim,)` is what tokens past the map's edge hold; None if regions divide the map.
    """
    assert problem.is_plain
    assert problem.qk_dim == problem.dim
    sizes: dict[str, Any] = {name: getattr(problem, name) for name in ("num_heads", "n_win", "topk")}
    ours = partial(functional.bi_level_routing_attention, **sizes, padding=padding)
    by_authors = "routing, gather, attention (NCHW, as BiFormer's authors have it)"
    by_flex = "routing (einops), block mask, reordering, FlexAttention"
    peers = {
        "fused": Peer(f"routing, attention ({backend})", partial(ours, backend=backend)),
        "reference": Peer("routing, attention (einops)", partial(ours, backend="reference")),
        "gather": Peer(by_authors, partial(gather, problem=problem, padding=padding)),
        "flex": Peer(by_flex, partial(route_and_flex, problem=problem, padding=padding)),
        "dense": Peer("dense attention", partial(dense_attention, num_heads=problem.num_heads)),
    }
    if backend != "torch":  # the torch backend serves GPUs that Triton does not support
        peers["torch"] = Peer("routing, attention (torch)", partial(ours, backend="torch"))
    return peers


def dense_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention of every token to every token, by PyTorch's fused kernels."""
    query, key, value = rearrange(qkv, "n h w (t m c) -> t n m (h w) c", t=3, m=num_heads).unbind(0)
    # As in the modules, the scale depends on the channels of all heads together.
    out = F.scaled_dot_product_attention(query, key, value, scale=(qkv.shape[-1] // 3) ** -0.5)
    return rearrange(out, "n m (h w) c -> n h w (m c)", h=qkv.shape[1])


def gather(qkv: Tensor, problem: Problem, padding: Tensor | None) -> Tensor:
    """The NCHW form of BiFormer's authors, rewritten: `torch.gather` copies all chosen keys and values."""
    qkv = whole_map(qkv, problem.grid, padding)
    grid, heads = problem.grid, problem.num_heads
    size = (grid.region_height, grid.region_width)
    query, key, value = qkv.permute(0, 3, 1, 2).chunk(3, dim=1)
    # Means in float32, as in all peers: in half precision, rounding would decide near ties differently.
    means = (F.avg_pool2d(x.detach().float(), size).flatten(2) for x in (query, key))
    r_idx = torch.einsum("ncp,ncq->npq", *means).topk(problem.topk, dim=-1).indices
    axes = {"m": heads, "j": problem.n_win, "i": problem.n_win}
    query, key, value = (
        rearrange(x, "n (m c) (j h) (i w) -> n m (j i) (h w) c", **axes) for x in (query, key, value)
    )
    index = r_idx[:, None, :, :, None, None].expand(-1, heads, -1, -1, *key.shape[3:])
    key, value = (
        x[:, :, None].expand(-1, -1, grid.n_regions, -1, -1, -1).gather(3, index).flatten(3, 4)
        for x in (key, value)
    )
    weight = (query * problem.dim**-0.5 @ key.transpose(-2, -1)).softmax(-1)
    out = rearrange(weight @ value, "n m (j i) (h w) c -> n (j h) (i w) (m c)", h=size[0], **axes)
    return out[:, : problem.height, : problem.width]


def route_and_flex(qkv: Tensor, problem: Problem, padding: Tensor | None) -> Tensor:
    """Routing in einops, then FlexAttention over tokens in the order of their regions."""
    qkv = whole_map(qkv, problem.grid, padding)
    _, r_idx = functional.region_routing(qkv, n_win=problem.n_win, topk=problem.topk, backend="reference")
    mask = block_mask(r_idx, problem.grid.region_tokens)
    axes = {"j": problem.n_win, "i": problem.n_win, "m": problem.num_heads}
    regions = rearrange(qkv, "n (j h) (i w) (t m c) -> t n m (j i h w) c", t=3, **axes).contiguous()
    out = compiled_flex_attention()(*regions.unbind(0), block_mask=mask, scale=problem.dim**-0.5)
    out = rearrange(out, "n m (j i h w) c -> n (j h) (i w) (m c)", h=problem.grid.region_height, **axes)
    return out[:, : problem.height, : problem.width]


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled to a fused kernel; uncompiled it would hold all scores."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def block_mask(r_idx: Tensor, tokens: int) -> BlockMask:
    """The routing as FlexAttention's mask: blocks are skipped, masked, or computed without a mask.

    The blocks are found by products of small matrices of regions. This favours FlexAttention: its own
    `create_block_mask` finds the same blocks, but evaluates `mask_mod` for every pair of tokens. Queries and
    keys are ordered region by region, with `tokens` in each; `r_idx` is `(N, P, topk)`, int64.
    """
    n_images, n_regions, _ = r_idx.shape
    length = n_regions * tokens
    chosen = r_idx.new_zeros(n_images, n_regions, n_regions, dtype=torch.bool).scatter_(2, r_idx, True)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return chosen[batch, query // tokens, key // tokens]

    starts = torch.arange(0, length, BLOCK, device=r_idx.device)[:, None]
    regions = torch.arange(n_regions, device=r_idx.device) * tokens
    # Float32 is exact: every element is a sum of at most P**2 ones and zeros.
    overlaps = ((regions < starts + BLOCK) & (regions + tokens > starts)).float()
    any_chosen = (overlaps @ chosen.float() @ overlaps.t()) > 0
    any_left_out = (overlaps @ (~chosen).float() @ overlaps.t()) > 0
    # A block that reaches past the last token is masked, as by `create_block_mask`.
    inside = starts[:, 0] + BLOCK <= length
    full = any_chosen & ~any_left_out & (inside[:, None] & inside)
    return BlockMask.from_kv_blocks(
        *_listed(any_chosen & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """By row of blocks, int32: how many are set `(N, 1, R)`; all columns, set ones first `(N, 1, R, C)`."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()
