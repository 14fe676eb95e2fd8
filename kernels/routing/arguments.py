"""Groups of arguments that the routing kernels take; the attention kernels share `Marks`. Needs no Triton."""

from typing import NamedTuple

from torch import Tensor


class Marks(NamedTuple):
    """The routing graph as a mask: the product of a query's and a key's marks is 0 or -2**30.

    On the host the tables are tensors, in a kernel pointers.

    Attributes:
        query_regions: `(P * S,)` int32, the region of every query, in the order of the regions.
        query_marks: `(N, G, P, BLOCK_MARKS)` float16, 0 at the key regions that a region chose, else -2**15.
        key_marks: `(P_kv * S_kv, BLOCK_MARKS)` float16, 2**15 at the region of every key, else 0.
    """

    query_regions: Tensor
    query_marks: Tensor
    key_marks: Tensor


class MeansConfig(NamedTuple):
    """Compile-time numbers of `region_means_kernel`.

    Attributes:
        MEAN_DIM: channels to take the mean of, the first of a token.
        PACKED: channels of a token.
        BLOCK_TOKENS: tokens of a tile.
        BLOCK_C: channels of a tile.
    """

    MEAN_DIM: int
    PACKED: int
    BLOCK_TOKENS: int
    BLOCK_C: int


class RouteConfig(NamedTuple):
    """Compile-time numbers of `route_kernel`.

    Attributes:
        DIM: channels of a region's query.
        ROW_STRIDE: elements from one region's row to the next.
        BLOCK_Q: query regions of a program.
        BLOCK_R: all key regions, rounded up to a power of two.
        BLOCK_C: channels in a step of the product.
        BLOCK_K: `topk`, rounded up to a power of two.
        PRECISION: of the float32 product, as `tl.dot` names it.
    """

    DIM: int
    ROW_STRIDE: int
    BLOCK_Q: int
    BLOCK_R: int
    BLOCK_C: int
    BLOCK_K: int
    PRECISION: str


class PairSumConfig(NamedTuple):
    """Compile-time numbers of `sum_over_pairs_kernel`.

    Attributes:
        DIM: channels of a region's row.
        SOURCE_STRIDE: elements from one row of the source to the next.
        BLOCK_C: channels of a program.
    """

    DIM: int
    SOURCE_STRIDE: int
    BLOCK_C: int


class ListConfig(NamedTuple):
    """Compile-time numbers of `list_tokens_kernel`.

    Attributes:
        FROM_PAIRS: the entries are pairs, not regions.
        BLOCK_ENTRIES: entries of a program.
        BLOCK_TOKENS: tokens of a step.
    """

    FROM_PAIRS: bool
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
    """Compile-time number of `invert_graph_kernel` and `cut_rows_kernel`.

    Attributes:
        BLOCK: pairs or regions of a step.
    """

    BLOCK: int
