"""The attentions that the kernels are measured against, as functions on one packed projection.

All take `qkv` `(N, H, W, 3*dim)` and the routing `r_idx` `(N, P, topk)`, int64, that the benchmark computes
once, and return `(N, H, W, dim)`. No peer has LePE or projections. Those that route do that work too, and
then attend to the regions given, so that all attend to the same regions whatever they round. Where regions do
not divide the map, `fused` takes its padding as it is; `reference` and `flex` make a padded map first, which
counts; `dense` needs none.

| peer | what a call includes |
|---|---|
| `fused` | routing and attention, on a fused backend of this package |
| `reference` | routing and attention, in einops: keys and values gathered, scores in memory |
| `flex` | the reference's routing; building the block mask; reordering; FlexAttention, compiled |
| `dense` | attention of every token to every token: no routing |
| `fused, regions given` | the attention alone |
| `reference, regions given` | the attention alone |
| `flex, regions given` | building the block mask; reordering; FlexAttention |
| `flex, mask given` | reordering and FlexAttention: what would remain if regions never changed |

FlexAttention skips whole blocks of queries by keys, multiples of 128 each on a GPU, and evaluates a mask in
those that are allowed in part. A region has 100, 64, 16, 9, 4 or 1 tokens, so tokens are reordered region by
region: then a block holds few regions, and where regions are large most blocks are skipped. Reordering reads
the packed projection and writes queries, keys and values as FlexAttention wants them, which an attention that
is not in place has to do anyway. `create_block_mask` is the general way to a block mask, and evaluates the
mask for every pair of tokens; here the blocks follow from products of small matrices of regions, with the
same result, which favours FlexAttention. Its kernel options are PyTorch's defaults. Routing changes every
step, so every step must build the mask anew: the fair row is `flex`, or `flex, regions given`; `flex, mask
given` shows what the mask costs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bra_triton import functional, reference
from bra_triton.backend.region_layout import pad_map
from bra_triton.kernels.grid import RegionGrid
from bra_triton.operators import attention as attention_operators
from bra_triton.operators import routing as routing_operators
from bra_triton.spec import AttentionSpec

BLOCK = 128
Attention = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to compute the attention.

    Attributes:
        name: as in the table above.
        includes: what a call includes.
        prepare: called once with `qkv` and `r_idx`, untimed; returns the function that is timed.
        compared_with: the fused peer that does the same share of the work.
        is_routed: whether it attends to the regions given, or to all.
    """

    name: str
    includes: str
    prepare: Callable[[Tensor, Tensor], Attention]
    compared_with: str
    is_routed: bool = True


def peers_for(
    spec: AttentionSpec, backend: str, padding: Tensor | None = None, *, compile_flex: bool = True
) -> dict[str, Peer]:
    """The peers by name.

    Args:
        spec: what is computed; `qk_dim == dim`, no routing weight.
        backend: the fused backend, `"triton"` or `"torch"`.
        padding: `(3*dim,)`: what tokens past the map's edge hold, where regions do not divide it.
        compile_flex: FlexAttention as a fused kernel; otherwise its definition, which holds the scores.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    if spec.qk_dim != spec.dim or spec.routing_weight != "none":
        raise ValueError(f"spec must have qk_dim == dim and no routing weight, got {spec}")

    def always(attend: Attention) -> Callable[[Tensor, Tensor], Attention]:
        return lambda qkv, r_idx: attend

    def routed(route: Callable[[Tensor], object], attend: Attention) -> Attention:
        def both(qkv: Tensor, r_idx: Tensor) -> Tensor:
            route(qkv)
            return attend(qkv, r_idx)

        return both

    def padded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return functools.partial(_on_padded_map, function, padding=padding, spec=spec)

    fused = functools.partial(fused_attention, padding=padding, spec=spec, backend=backend)
    plain = padded(reference_attention)
    flex = padded(functools.partial(flex_peer_attention, compiled=compile_flex))
    route_fused = functools.partial(fused_routing, padding=padding, spec=spec, backend=backend)
    route_plain = padded(reference_routing)

    def with_mask(qkv: Tensor, r_idx: Tensor) -> Attention:
        grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
        mask = block_mask(r_idx, grid.region_tokens)
        return lambda qkv, r_idx: flex(qkv, r_idx, mask=mask)

    alone, whole = "fused, regions given", "fused"
    rows = (
        Peer("fused", f"routing, attention ({backend})", always(routed(route_fused, fused)), whole),
        Peer("reference", "routing, attention (einops)", always(routed(route_plain, plain)), whole),
        Peer(
            *("flex", "routing (einops), block mask, reordering, FlexAttention"),
            *(always(routed(route_plain, flex)), whole),
        ),
        Peer("dense", "dense attention", always(functools.partial(dense_attention, spec=spec)), whole, False),
        Peer("fused, regions given", f"attention ({backend})", always(fused), alone),
        Peer("reference, regions given", "attention (einops)", always(plain), alone),
        Peer("flex, regions given", "block mask, reordering, FlexAttention", always(flex), alone),
        Peer("flex, mask given", "reordering, FlexAttention", with_mask, alone),
    )
    return {peer.name: peer for peer in rows}


def fused_routing(qkv: Tensor, padding: Tensor | None, spec: AttentionSpec, backend: str) -> Tensor:
    """How this package routes; returns `r_idx`, int32."""
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    if spec.chooses_all:  # as the modules do
        return functional.all_regions(qkv, grid)
    means = routing_operators.region_means(qkv.detach(), padding, spec.qk_dim, grid.numbers, backend)
    query, key = means.split(spec.qk_dim, dim=-1)
    return routing_operators.route(query, key, spec.topk, spec.scale, backend)[1]


def fused_attention(
    qkv: Tensor, r_idx: Tensor, padding: Tensor | None, spec: AttentionSpec, backend: str
) -> Tensor:
    """This package's attention to the regions given."""
    trains = torch.is_grad_enabled() and qkv.requires_grad
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    return attention_operators.routed_attention(
        *(qkv, None, padding, r_idx.int(), None, None, None),
        *(spec.qk_dim, spec.num_heads, grid.numbers, spec.scale, "none", trains, backend),
    )[0]


def reference_routing(qkv: Tensor, spec: AttentionSpec) -> Tensor:
    """Routing in einops; returns `r_idx`."""
    return reference.route(qkv, spec)[1]


def reference_attention(qkv: Tensor, r_idx: Tensor, spec: AttentionSpec) -> Tensor:
    """The einops form: gathers keys and values."""
    return reference.routed_attention(qkv, r_idx, spec)[0]


def _on_padded_map(
    function: Callable[..., Tensor],
    qkv: Tensor,
    *args: Tensor,
    padding: Tensor | None,
    spec: AttentionSpec,
    **options: object,
) -> Tensor:
    """Calls a function of a map that the regions divide; crops the map that it returns, if it is one."""
    height, width = qkv.shape[1:3]
    grid = RegionGrid.of_windows(height, width, spec.n_win, auto_pad=padding is not None)
    if not grid.is_padded:
        return function(qkv, *args, spec=spec, **options)
    out = function(pad_map(qkv, grid, padding), *args, spec=spec, **options)
    return out[:, :height, :width] if out.dim() == 4 else out


def dense_attention(qkv: Tensor, r_idx: Tensor, spec: AttentionSpec) -> Tensor:
    """Every token to every token by PyTorch's fused kernels; does not look at `r_idx`."""
    query, key, value = rearrange(qkv, "n h w (t m c) -> t n m (h w) c", t=3, m=spec.num_heads).unbind(0)
    out = F.scaled_dot_product_attention(query, key, value, scale=spec.scale)
    return rearrange(out, "n m (h w) c -> n h w (m c)", h=qkv.shape[1])


def dense_by_definition(spec: AttentionSpec) -> Attention:
    """What `dense_attention` computes, with all scores in memory: for checking it, not for timing."""

    def attend(qkv: Tensor, r_idx: Tensor) -> Tensor:
        query, key, value = rearrange(qkv, "n h w (t m c) -> t n m (h w) c", t=3, m=spec.num_heads)
        out = ((query @ key.transpose(-2, -1)) * spec.scale).softmax(-1) @ value
        return rearrange(out, "n m (h w) c -> n h w (m c)", h=qkv.shape[1])

    return attend


def flex_peer_attention(
    qkv: Tensor, r_idx: Tensor, spec: AttentionSpec, compiled: bool = True, mask: BlockMask | None = None
) -> Tensor:
    """FlexAttention over tokens in the order of their regions; builds the block mask unless it is given."""
    mask = mask or block_mask(r_idx, qkv.shape[1] * qkv.shape[2] // spec.n_win**2)
    sides = {"j": spec.n_win, "i": spec.n_win, "m": spec.num_heads}
    regions = rearrange(qkv, "n (j h) (i w) (t m c) -> t n m (j i h w) c", t=3, **sides).contiguous()
    query, key, value = regions.unbind(0)
    attend = _compiled_flex_attention() if compiled else _plain_flex_attention
    out = attend(query, key, value, block_mask=mask, scale=spec.scale)
    height = qkv.shape[1] // spec.n_win
    return rearrange(out, "n m (j i h w) c -> n (j h) (i w) (m c)", h=height, **sides)


_plain_flex_attention: Callable[..., Any] = flex_attention


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def chosen_pairs(r_idx: Tensor) -> Tensor:
    """Whether a region attends to another: `(N, P, P)`, bool."""
    batch, n_regions, _ = r_idx.shape
    pairs = torch.zeros(batch, n_regions, n_regions, dtype=torch.bool, device=r_idx.device)
    return pairs.scatter_(2, r_idx, torch.ones_like(r_idx, dtype=torch.bool))


def mask_of_regions(chosen: Tensor, tokens: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod` of `chosen_pairs`, for tokens in the order of their regions."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return chosen[batch, query // tokens, key // tokens]

    return mask_mod


def block_mask(r_idx: Tensor, tokens: int) -> BlockMask:
    """The routing as blocks that are skipped, masked, or attended to without looking at the mask.

    The same as `create_block_mask` of `mask_of_regions`, without evaluating the mask for every two tokens.

    Args:
        r_idx: `(N, P, topk)`, int64.
        tokens: in a region.
    """
    chosen = chosen_pairs(r_idx)
    length = r_idx.shape[1] * tokens
    n_blocks = -(-length // BLOCK)
    starts = torch.arange(n_blocks, device=r_idx.device)[:, None] * BLOCK
    regions = torch.arange(r_idx.shape[1], device=r_idx.device) * tokens
    # Float32: sums of up to P**2 ones and zeros, exact.
    overlaps = ((regions < starts + BLOCK) & (regions + tokens > starts)).float()
    any_chosen = (overlaps @ chosen.float() @ overlaps.t()) > 0
    any_left_out = (overlaps @ (~chosen).float() @ overlaps.t()) > 0
    # A block that reaches past the last token is masked, as create_block_mask has it.
    inside = starts[:, 0] + BLOCK <= length
    full = any_chosen & ~any_left_out & (inside[:, None] & inside)
    return BlockMask.from_kv_blocks(
        *_listed(any_chosen & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_of_regions(chosen, tokens),
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and their columns first: `(N, 1, R)`, `(N, 1, R, C)`, int32."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()
