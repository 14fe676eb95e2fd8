"""When an attention is one of a small map."""

from ..arrays import A
from ..problem import RoutedAttention
from ..tiles import channel_block

# A program compares the logits of all regions with each other.
MOST_REGIONS = 64
# Keys that a region attends to.
MOST_KEYS = 256
# Rows of a program's tile: the least that a matrix product takes, and so the most tokens of a region. Beyond
# it lists are faster. On an H100 (float16, batch 8) a forward and a training step of 40 x 40 x 128 in regions
# of 25 tokens take 36 and 98 us with lists, by a program a region 40 and 105; of 20 x 20 x 256 in regions of
# 16 tokens 24 and 62 with lists, 19 and 52 by a program a region.
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
