"""When an attention is one of a small map."""

from ..arrays import A
from ..problem import RoutedAttention
from ..tiles import channel_block

# A program compares the logits of all regions with each other.
MOST_REGIONS = 64
# Keys that a region attends to.
MOST_KEYS = 256
# Rows of a program's tile: the least that a matrix product takes, and so the most tokens of a region. Beyond
# it lists are faster: on an H100 they were with regions of 25 tokens, and with regions of 16 they were not
# (`bra-bench kernel-times`, with and without `--form routed`).
BLOCK_OWN = 16
# Channels of a head, by bytes of an element: with twice as many the backward spills (compiled for sm_80 and
# sm_90).
MOST_CHANNELS = {2: 64, 4: 32}


def serves(problem: RoutedAttention[A]) -> bool:
    """Whether the kernels of small maps can take an attention whose regions are to be chosen."""
    widest = channel_block(max(problem.qk_head_dim, problem.v_head_dim))
    # Comparisons alone: a compiler that traces sizes would take anything rounded for fixed.
    return (
        problem.r_idx is not None
        and widest <= MOST_CHANNELS[problem.query.dtype.itemsize]
        and problem.query_grid.region_tokens <= BLOCK_OWN
        and problem.kv_grid.region_tokens <= BLOCK_OWN
        and problem.kv_grid.n_regions <= MOST_REGIONS
        and problem.topk * problem.kv_grid.region_tokens <= MOST_KEYS
    )
