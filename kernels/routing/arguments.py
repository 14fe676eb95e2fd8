"""Groups of arguments of the routing kernels; attention kernels take `Lists` and `Marks`, too.

This file does not import Triton. docs/glossary.md explains the letters in the shapes.
"""

from typing import NamedTuple

from ..arrays import Buffer

# The value of a mark. Its square is near the largest float32, far above any product of a query and a key.
MARK = 2.0**63


class Lists(NamedTuple):
    """Token numbers of the tokens that programs own and of those on the other side; -1 stands for padding.

    With marks, and where every region attends to all, a program loops over all tokens of the other side. The
    list of a side is then None unless the side has padding: the kernel takes the map's tokens in order.

    Attributes:
        region_list: tokens of every region that programs own: `(P, S)` int32 of queries; in dK/dV
            `(P_kv, S_kv)` of keys.
        token_list: tokens that the programs of each region loop over: `(N, G, P, TOPK * S_kv)` int32 of keys;
            in dK/dV `(N, G, P * TOPK * S)` of queries, pair after pair in the order of the inverse graph.
            With marks, or where the map is one region, a list of all tokens, `(P_kv * S_kv,)` or `(P * S,)`.
        factors: of the shape of `token_list`, float32: factor of each listed key and value, or of each listed
            query's pair; None for 1.
    """

    region_list: Buffer | None
    token_list: Buffer | None
    factors: Buffer | None


class Marks(NamedTuple):
    """The routing graph as a mask: the product of a query's and a key's marks is 0 or -MARK**2.

    On the host the tables are buffers, in a kernel pointers. Marks are bfloat16, whatever the dtype of the
    maps. float16 would not do: it ends at 2**16, and the scores of bfloat16 maps may differ by more than
    2**32, the largest product of two such marks.

    Attributes:
        query_regions: `(P * S,)` int32, the region of every query, in the order in which programs own
            queries: the order of the region list or, without one, of the map.
        query_marks: `(N, G, P, BLOCK_MARKS)` bfloat16, 0 at the key regions that a region chose, else -MARK.
        key_marks: `(P_kv * S_kv, BLOCK_MARKS)` bfloat16, for every key MARK at its region, else 0; keys are
            in the order of the list of all keys or, without one, of the map.
    """

    query_regions: Buffer
    query_marks: Buffer
    key_marks: Buffer


class Inverse(NamedTuple):
    """The inverse graph, see `graph`.

    Attributes:
        row_start: `(N, G, P_kv + 1)` int32.
        pairs: `(N, G, P * TOPK)` int32; nothing is written past the last row.
        choices: `(N, G, P * TOPK)` int32, likewise; None if no finer inverse is made from this one.
        work: `(N, G, extras + P_kv, 4)` int32; None if only the rows are needed.
    """

    row_start: Buffer
    pairs: Buffer
    choices: Buffer | None
    work: Buffer | None


class MeansConfig(NamedTuple):
    """Compile-time numbers of `region_means_kernel` and `spread_means_kernel`.

    Attributes:
        MEAN_DIM: how many of a token's first channels to take the mean of.
        PACKED: channels of a token.
        BLOCK_TOKENS: tokens of a tile.
        BLOCK_C: channels of a tile.
        COUNTS_PADDING: for the gradient only: tokens past the map's edge take part in the means.
    """

    MEAN_DIM: int
    PACKED: int
    BLOCK_TOKENS: int
    BLOCK_C: int
    COUNTS_PADDING: bool = True


class RouteConfig(NamedTuple):
    """Compile-time numbers of `route_kernel`.

    Attributes:
        DIM: channels of a region's query.
        ROW_STRIDE: elements from one region's row to the next.
        BLOCK_Q: query regions of a program.
        BLOCK_R: all key regions, rounded up to a power of two; with IN_BLOCKS the key regions of a block.
        BLOCK_C: channels in a step of the product.
        BLOCK_K: `topk`, rounded up to a power of two.
        PRECISION: of the float32 product, as `tl.dot` names it.
        IN_BLOCKS: process the key regions in blocks.
        LISTS: list the tokens of all regions and, if there is a token list, of the chosen regions.
        BLOCK_TOKENS: tokens of a chosen region in a step of listing them.
        BLOCK_REGION_TOKENS: tokens of a query region in a step of listing them.
        BLOCK_MARKED: tokens in a step of marking them.
    """

    DIM: int
    ROW_STRIDE: int
    BLOCK_Q: int
    BLOCK_R: int
    BLOCK_C: int
    BLOCK_K: int
    PRECISION: str
    IN_BLOCKS: bool
    LISTS: bool
    BLOCK_TOKENS: int
    BLOCK_REGION_TOKENS: int
    BLOCK_MARKED: int


class RoutingGradientConfig(NamedTuple):
    """Compile-time numbers of the kernels that compute the router's gradient.

    Attributes:
        DIM: channels of a region's query.
        ROW_STRIDE: elements from one region's row to the next.
        GRAD_STRIDE: elements from one row of the gradient to the next.
        BLOCK_K: `topk`, rounded up to a power of two.
        BLOCK_C: channels of a program.
    """

    DIM: int
    ROW_STRIDE: int
    GRAD_STRIDE: int
    BLOCK_K: int
    BLOCK_C: int


class ListConfig(NamedTuple):
    """Compile-time numbers of `list_tokens_kernel`.

    Attributes:
        BLOCK_ENTRIES: entries of a program.
        BLOCK_TOKENS: tokens of a step.
    """

    BLOCK_ENTRIES: int
    BLOCK_TOKENS: int


class MarkConfig(NamedTuple):
    """Compile-time numbers of `mark_choices_kernel`.

    Attributes:
        BLOCK_ROWS: rows of each table that a program writes.
        BLOCK_MARKS: marks in a row: the key regions, rounded up to a power of two of at least 16.
    """

    BLOCK_ROWS: int
    BLOCK_MARKS: int


class GraphConfig(NamedTuple):
    """Compile-time numbers of `invert_graph_kernel`.

    Attributes:
        LISTS: cut the rows into pieces, and list their queries.
        BLOCK: pairs of a step.
        BINS: if rows are sorted by length, a power of two above the number of key regions; else 1.
        SHIFT: a row holds 2**SHIFT key regions.
        FAN_BITS: a row of the coarser inverse holds 2**FAN_BITS rows; 0 if there is no coarser inverse.
        SKIPS_PADDING: leave out the pairs of regions whose queries are all padding.
        BLOCK_ENTRIES: pairs in a step of listing their queries.
        BLOCK_TOKENS: tokens in such a step.
    """

    LISTS: bool
    BLOCK: int
    BINS: int
    SHIFT: int
    FAN_BITS: int
    SKIPS_PADDING: bool
    BLOCK_ENTRIES: int
    BLOCK_TOKENS: int
