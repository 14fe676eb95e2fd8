"""Groups of arguments that the kernels of small maps take. Needs no Triton.

Maps, padding, saved tensors and results are the groups of `attention.arguments`.
"""

from typing import NamedTuple

from ..arrays import Buffer


class RegionRows(NamedTuple):
    """The rows from which a program chooses the regions that its region attends to.

    Attributes:
        query: `(N, P, ROUTING_DIM)` float32, mean query of each region; rows `ROUTING_STRIDE` elements apart.
        key: `(N, P, ROUTING_DIM)` float32, mean key of each region, likewise.
    """

    query: Buffer
    key: Buffer


class Choices(NamedTuple):
    """The regions that each region chose, and their routing weights.

    The forward writes both for the backward. Where `route_kernel` has written them, the forward reads them.

    Attributes:
        r_idx: `(N, P, topk)` int32; None if neither this forward nor a backward reads it.
        r_weight: `(N, P, topk)` float32, likewise; also None if the attention does not use routing weights.
    """

    r_idx: Buffer | None
    r_weight: Buffer | None


class SmallMapConfig(NamedTuple):
    """Compile-time numbers of the kernels of small maps; none depends on the map's size.

    Attributes:
        NUM_HEADS: attention heads.
        HEADS: heads of a program, which divide NUM_HEADS; a power of two.
        QK_HEAD_DIM: channels of a query or key in one head.
        V_HEAD_DIM: channels of a value in one head.
        QUERY_STRIDE: elements from one token of the queries to the next.
        KEY_STRIDE: likewise of the keys.
        VALUE_STRIDE: likewise of the values.
        BLOCK_OWN: tokens of a region, rounded up to a power of two of at least 16.
        BLOCK_STEP: keys in a step of a program that owns queries; queries in a step of one that owns keys.
        BLOCK_QK: QK_HEAD_DIM, rounded up to a power of two of at least 16.
        BLOCK_V: V_HEAD_DIM, likewise.
        BLOCK_P: regions, rounded up to a power of two.
        BLOCK_K: `topk`, rounded up to a power of two.
        IS_SOFT: the routing weights multiply keys and values.
        QUERY_IS_PADDED: some queries are padding.
        PRECISION: precision of float32 products, as `tl.dot` names it.
        ROUTING_DIM: forward: channels of a region's query.
        ROUTING_STRIDE: forward: elements from one region's row to the next.
        BLOCK_C: forward: channels in a step of the product of region queries and keys.
        LEPE_STRIDE: forward: elements from one token of LePE's values to the next.
        LEPE_KERNEL: forward: side of LePE's convolution, 0 for none.
        GRAD_QUERY_STRIDE: backward: elements from one token of the queries' gradient to the next.
        GRAD_KEY_STRIDE: backward: likewise of the keys'.
        GRAD_VALUE_STRIDE: backward: likewise of the values'.
    """

    NUM_HEADS: int
    HEADS: int
    QK_HEAD_DIM: int
    V_HEAD_DIM: int
    QUERY_STRIDE: int
    KEY_STRIDE: int
    VALUE_STRIDE: int
    BLOCK_OWN: int
    BLOCK_STEP: int
    BLOCK_QK: int
    BLOCK_V: int
    BLOCK_P: int
    BLOCK_K: int
    IS_SOFT: bool
    QUERY_IS_PADDED: bool
    PRECISION: str
    ROUTING_DIM: int = 0
    ROUTING_STRIDE: int = 0
    BLOCK_C: int = 0
    LEPE_STRIDE: int = 0
    LEPE_KERNEL: int = 0
    GRAD_QUERY_STRIDE: int = 0
    GRAD_KEY_STRIDE: int = 0
    GRAD_VALUE_STRIDE: int = 0


class SmallMapGradients(NamedTuple):
    """Gradients that the backward writes.

    Attributes:
        query: of the shape of the queries, tokens `GRAD_QUERY_STRIDE` elements apart.
        key: of the shape of the keys, tokens `GRAD_KEY_STRIDE` elements apart.
        value: of the shape of the values, tokens `GRAD_VALUE_STRIDE` elements apart.
        padding: `(N, NUM_HEADS, P, 1, QK_HEAD_DIM + V_HEAD_DIM)` float32, each region's share of the
            gradients of the padding's key and value; None if they are not needed.
    """

    query: Buffer
    key: Buffer
    value: Buffer
    padding: Buffer | None
