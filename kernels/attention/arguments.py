"""Groups of arguments that the attention kernels take. Needs no Triton.

A group of pointers holds buffers on the host and pointers in a kernel; the compiler removes the code for
pointers that are None. Kernels take the sizes of a map as single arguments, not in a group: if a number in a
tuple becomes 1 or a multiple of 16, Triton compiles the kernel again, even where `do_not_specialize` names
the number.

P regions of S tokens hold the queries, P_kv regions of S_kv tokens the keys and values. Each image has G
graphs, which say which region attends to which: 1 for all heads, or one per head.
"""

from typing import NamedTuple

from ..arrays import Buffer
from ..problem import RoutedAttention


class Maps(NamedTuple):
    """The maps that attention reads: three separate maps, or slices of one packed map.

    Attributes:
        query: `(N, H, W, NUM_HEADS * QK_HEAD_DIM)`, tokens `QUERY_STRIDE` elements apart.
        key: `(N, H_kv, W_kv, NUM_HEADS * QK_HEAD_DIM)`, tokens `KEY_STRIDE` elements apart.
        value: `(N, H_kv, W_kv, NUM_HEADS * V_HEAD_DIM)`, tokens `VALUE_STRIDE` elements apart.
    """

    query: Buffer
    key: Buffer
    value: Buffer

    @classmethod
    def of(cls, problem: RoutedAttention[Buffer]) -> "Maps":
        """The maps of an attention."""
        return cls(problem.query, problem.key, problem.value)


class PaddingRows(NamedTuple):
    """The key and the value that every padding token holds.

    Attributes:
        key: `(NUM_HEADS * QK_HEAD_DIM,)`.
        value: `(NUM_HEADS * V_HEAD_DIM,)`.
    """

    key: Buffer
    value: Buffer

    @classmethod
    def of(cls, problem: RoutedAttention[Buffer]) -> "PaddingRows | None":
        """The rows of an attention's padding; None without padding."""
        return None if problem.padding is None else cls(problem.padding.key, problem.padding.value)


class ForwardResults(NamedTuple):
    """Arrays that the forward writes.

    Attributes:
        out: `(N, H, W, NUM_HEADS * V_HEAD_DIM)`, the attention's output plus LePE.
        attention: of the same shape, the attention's output without LePE, which the backward reads; None if
            there is no LePE or no backward follows.
        lse: `(N, NUM_HEADS, H * W)` float32, base-2 logarithm of the softmax's denominator for logits times
            `log2(e)`; None where no backward follows.
    """

    out: Buffer
    attention: Buffer | None
    lse: Buffer | None


class Saved(NamedTuple):
    """Arrays that dQ's kernel reads in addition to the forward's inputs.

    Attributes:
        out: `(N, H, W, NUM_HEADS * V_HEAD_DIM)`, the attention's output without LePE.
        lse: as in `ForwardResults`.
        grad_out: the gradient of `out`, of the same shape, contiguous.
    """

    out: Buffer
    lse: Buffer
    grad_out: Buffer


class QueryResults(NamedTuple):
    """Arrays that dQ's kernel writes.

    Attributes:
        grad_query: of the shape of the queries, tokens `GRAD_QUERY_STRIDE` elements apart.
        statistics: `(N, NUM_HEADS, H * W, 2)` float32: lse and delta side by side, for dK/dV.
        grad_factor: `(N, NUM_HEADS, P, tiles, TOPK)` float32, each tile's share of the factor's gradient;
            None if it is not needed.
    """

    grad_query: Buffer
    statistics: Buffer
    grad_factor: Buffer | None


class KeyValueResults(NamedTuple):
    """Arrays that dK/dV's kernel and the sum of its pieces write.

    Attributes:
        grad_key: of the shape of the keys, tokens `GRAD_KEY_STRIDE` elements apart.
        grad_value: of the shape of the values, tokens `GRAD_VALUE_STRIDE` elements apart.
        grad_padding: `(N, NUM_HEADS, P_kv, tiles, QK_HEAD_DIM + V_HEAD_DIM)` float32, each tile's share of
            the gradients of the padding's key and value; None if they are not needed.
        partial_key: `(N, NUM_HEADS, n_partials, S_kv, QK_HEAD_DIM)` float32, the pieces' partial sums.
        partial_value: `(N, NUM_HEADS, n_partials, S_kv, V_HEAD_DIM)` float32, likewise.
    """

    grad_key: Buffer
    grad_value: Buffer
    grad_padding: Buffer | None
    partial_key: Buffer
    partial_value: Buffer


class Pieces(NamedTuple):
    """Arrays from which `sum_pieces` finds the rows that were cut into pieces, and their regions' tokens.

    Attributes:
        row_start: `(N, G, P_kv + 1)` int32, see `routing.graph`.
        region_list: `(P_kv, S_kv)` int32, tokens of the key regions.
    """

    row_start: Buffer
    region_list: Buffer


class AttentionConfig(NamedTuple):
    """Compile-time numbers of the attention kernels; none depends on the map's size.

    Attributes:
        NUM_HEADS: attention heads.
        N_GRAPHS: graphs per image; 0 if the whole map is one region, so that all images share one graph.
        QK_HEAD_DIM: channels of a query or key in one head.
        V_HEAD_DIM: channels of a value in one head.
        QUERY_STRIDE: elements from one token of the queries to the next.
        KEY_STRIDE: likewise of the keys.
        VALUE_STRIDE: likewise of the values.
        BLOCK_M: queries of a tile.
        BLOCK_N: keys of a tile.
        BLOCK_TAIL: tokens in a step at the end of a list; these steps are masked.
        BLOCK_QK: QK_HEAD_DIM, rounded up to a power of two of at least 16.
        BLOCK_V: V_HEAD_DIM, likewise.
        BLOCK_MARKS: marks of a token; see `routing.arguments.Marks`.
        PRECISION: precision of float32 products, as `tl.dot` names it.
        EXP_SHARE: forward and dQ: one in EXP_SHARE exponentials is evaluated by multiply-adds; 0 for none.
        LEPE_STRIDE: forward: elements from one token of LePE's values to the next.
        LEPE_KERNEL: forward: side of LePE's convolution, 0 for none.
        GRAD_QUERY_STRIDE: dQ: elements from one token of the gradient to the next.
        BLOCK_SLOTS: dQ: TOPK, rounded up to a power of two.
        GRAD_KEY_STRIDE: dK/dV: elements from one token of the keys' gradient to the next.
        GRAD_VALUE_STRIDE: dK/dV: likewise of the values'.
        QUERY_IS_PADDED: some queries are padding.
        ADDS_TO_VALUE: dK/dV: add to the values' gradient, which already holds LePE's share.
    """

    NUM_HEADS: int
    N_GRAPHS: int
    QK_HEAD_DIM: int
    V_HEAD_DIM: int
    QUERY_STRIDE: int
    KEY_STRIDE: int
    VALUE_STRIDE: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_TAIL: int
    BLOCK_QK: int
    BLOCK_V: int
    BLOCK_MARKS: int
    PRECISION: str
    EXP_SHARE: int = 0
    LEPE_STRIDE: int = 0
    LEPE_KERNEL: int = 0
    GRAD_QUERY_STRIDE: int = 0
    BLOCK_SLOTS: int = 1
    GRAD_KEY_STRIDE: int = 0
    GRAD_VALUE_STRIDE: int = 0
    QUERY_IS_PADDED: bool = False
    ADDS_TO_VALUE: bool = False
