"""Groups of arguments that the routing kernels take; the attention kernels share `Marks`. Needs no Triton."""

from typing import NamedTuple

from ..arrays import Buffer

# What marks hold. The square is next to the highest float32, far above any product of a query and a key.
MARK = 2.0**63


class Marks(NamedTuple):
    """The routing graph as a mask: the product of a query's and a key's marks is 0 or -MARK**2.

    On the host the tables are buffers, in a kernel pointers. They hold bfloat16 whatever the maps hold:
    float16 ends at 2**16, and scores of bfloat16 maps may differ by more than its square.

    Attributes:
        query_regions: `(P * S,)` int32, the region of every query, in the order in which queries are owned:
            that of the list of all queries, or without one as they lie in the map.
        query_marks: `(N, G, P, BLOCK_MARKS)` bfloat16, 0 at the key regions that a region chose, else -MARK.
        key_marks: `(P_kv * S_kv, BLOCK_MARKS)` bfloat16, MARK at the region of every key, else 0; keys in
            the order in which they are walked.
    """

    query_regions: Buffer
    query_marks: Buffer
    key_marks: Buffer


class Inverse(NamedTuple):
    """The inverse graph, see `graph`.

    Attributes:
        row_start: `(N, G, P_kv + 1)` int32.
        pairs: `(N, G, P * TOPK)` int32; nothing is written past the last row.
        choices: `(N, G, P * TOPK)` int32, likewise; None where no finer inverse is to be made.
        work: `(N, G, extras + P_kv, 4)` int32; None where only the rows are wanted.
    """

    row_start: Buffer
    pairs: Buffer
    choices: Buffer | None
    work: Buffer | None


class MeansConfig(NamedTuple):
    """Compile-time numbers of `region_means_kernel` and `spread_means_kernel`.

    Attributes:
        MEAN_DIM: channels to take the mean of, the first of a token.
        PACKED: channels of a token.
        BLOCK_TOKENS: tokens of a tile.
        BLOCK_C: channels of a tile.
        COUNTS_PADDING: the gradient alone: tokens past the map's edge take part in the means.
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
        BLOCK_R: all key regions, rounded up to a power of two, or with IN_BLOCKS those of a step.
        BLOCK_C: channels in a step of the product.
        BLOCK_K: `topk`, rounded up to a power of two.
        PRECISION: of the float32 product, as `tl.dot` names it.
        IN_BLOCKS: walk the key regions in steps.
        LISTS: list tokens: of the chosen regions, if there is a list for them, and of all regions.
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
        BINS: more than the key regions, a power of two, where rows are to be listed by length; else 1.
        SHIFT: a row holds 2**SHIFT key regions.
        FAN_BITS: a row of a coarser inverse holds 2**FAN_BITS rows.
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
