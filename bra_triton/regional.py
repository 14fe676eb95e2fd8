"""Attention over regions that the caller has routed: argument checks, choice of the backend, and the call."""

from torch import Tensor

from . import nchw_reference
from .backend import registry
from .export import being_exported
from .operators import regional as operators


def regional_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    region_graph: Tensor,
    region_size: tuple[int, int],
    kv_region_size: tuple[int, int] | None = None,
    auto_pad: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention from every query region to the tokens of the key regions that a graph names, per head.

    The signature of `regional_routing_attention_torch` in rayleizhu/BiFormer `ops/torch/rrsda.py`, without
    the attention matrix among the results: none is ever held. `nchw_reference` has the same with it.

    Args:
        query: `(N, C, H, W)`, float32, float16, bfloat16 or float64. Channels-last maps, and channel slices
            of them, are read in place; others are copied once.
        key: `(N, C, H_kv, W_kv)`; the map may differ from the queries' in size and number of regions.
        value: `(N, C_v, H_kv, W_kv)`.
        scale: factor of the logits, positive.
        region_graph: `(N, num_heads, P, topk)`, int64 or int32: key regions that every query region attends
            to; `num_heads` divides `C` and `C_v`. Entries in `[0, P_kv)`, which is not checked: it would
            wait for the device. A graph expanded over the heads is used as one.
        region_size: tokens a column and a row of a query region.
        kv_region_size: the same of a key region; `region_size` by default.
        auto_pad: zero-pad maps at the bottom and right to multiples of the region sizes; padded keys take
            part, with logit 0 and value 0. Nothing is copied for it.
        backend: `"auto"`, or a name of `bra_triton.backend.registry.BACKENDS`.

    Returns:
        `(N, C_v, H, W)` in channels-last memory, of `query`'s dtype.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if the backend asked for by name cannot serve; says why.
    """
    arguments = (query, key, value, scale, region_graph, region_size, kv_region_size, auto_pad)
    grids = nchw_reference.check_arguments(*arguments)
    num_heads = region_graph.shape[1]
    if being_exported():  # with plain PyTorch, whatever the backend
        name = "reference"
    else:
        head_dims = query.shape[1] // num_heads, value.shape[1] // num_heads
        name = registry.select(backend, query, head_dims, grids, routes=False)
    if name == "reference":
        return nchw_reference.regional_routing_attention(*arguments)[0]
    graph = region_graph[:, :1] if region_graph.stride(1) == 0 else region_graph
    out, _ = operators.regional_attention(
        *(operators.with_dense_tokens(x.permute(0, 2, 3, 1)) for x in (query, key, value)),
        graph.int().contiguous(),
        *(grid.numbers for grid in grids),
        num_heads,
        scale,
        name,
    )
    return out.permute(0, 3, 1, 2)
