"""Limits of the kernels of small maps, and a check that an attention is within them."""

from ..arrays import A
from ..problem import RoutedAttention
from ..tiles import channel_block

# Most regions of a map: a program compares the logits of all regions in pairs.
MOST_REGIONS = 64
# Most keys that a region attends to.
MOST_KEYS = 256
# Rows of a program's tile, the fewest that a matrix product takes. It is also the most tokens of a region:
# lists are faster for larger regions. On an H100 they were faster with regions of 25 tokens, and not faster
# with regions of 16 (`bra-bench kernel-times`, with and without `--form routed`).
BLOCK_OWN = 16
# Most channels of a head, by bytes of an element: with twice as many the backward spills (compiled for sm_80
# and sm_90).
MOST_CHANNELS = {2: 64, 4: 32}


def serves(problem: RoutedAttention[A]) -> bool:
    """Whether the kernels of small maps can compute an attention whose regions are still to be chosen."""
    widest = channel_block(max(problem.qk_head_dim, problem.v_head_dim))
    # Sizes of the map are only compared, not rounded: a compiler that traces sizes as symbols would treat a
    # size that is rounded as a constant.
    return (
        problem.r_idx is not None
        and widest <= MOST_CHANNELS[problem.query.dtype.itemsize]
        and problem.query_grid.region_tokens <= BLOCK_OWN
        and problem.kv_grid.region_tokens <= BLOCK_OWN
        and problem.kv_grid.n_regions <= MOST_REGIONS
        and problem.topk * problem.kv_grid.region_tokens <= MOST_KEYS
    )
