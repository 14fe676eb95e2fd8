"""When an attention is one of a small map."""

from ..arrays import A
from ..lib.integers import next_power_of_2
from ..problem import RoutedAttention
from ..tiles import channel_block

# A program compares the logits of all regions with each other.
MOST_REGIONS = 64
# Keys that a region attends to.
MOST_KEYS = 256
# Elements of a tile of one head, which one warp holds, by bytes of an element: with twice as many the
# backward spills (compiled for sm_80 and sm_90).
MOST_TILE = {2: 1024, 4: 512}
# The least rows that a matrix product takes.
LEAST_BLOCK = 16


def serves(problem: RoutedAttention[A]) -> bool:
    """Whether the kernels of small maps can take an attention whose regions are to be chosen."""
    widest = channel_block(max(problem.qk_head_dim, problem.v_head_dim))
    most_tokens = MOST_TILE[problem.query.dtype.itemsize] // widest
    # Comparisons alone: a compiler that traces sizes would take anything rounded for fixed.
    return (
        problem.r_idx is not None
        and most_tokens >= LEAST_BLOCK
        and problem.query_grid.region_tokens <= most_tokens
        and problem.kv_grid.region_tokens <= most_tokens
        and problem.kv_grid.n_regions <= MOST_REGIONS
        and problem.topk * problem.kv_grid.region_tokens <= MOST_KEYS
    )


def block_own(problem: RoutedAttention[A]) -> int:
    """Rows of a program's tile: tokens of a region of queries or keys, rounded up to a power of two."""
    most = max(problem.query_grid.region_tokens, problem.kv_grid.region_tokens)
    return max(LEAST_BLOCK, next_power_of_2(most))
