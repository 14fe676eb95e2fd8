"""The choice between attention to all keys under a mask, and attention to the routed regions' keys."""

from ..lib.integers import cdiv
from ..problem import RoutedAttention

# Each key region adds a channel of marks to the product of queries and keys.
MOST_KEY_REGIONS = 64
# Larger regions fill the routed kernels' tiles.
MOST_REGION_TOKENS = 16
# Marks lower a logit by 2**126 * scale: with a smaller scale, keys that were not chosen might keep a weight.
LEAST_SCALE = 2.0**-100
# Rows of the largest tile that owns queries or keys.
ROUNDED_TO = 128


def is_cheaper(problem: RoutedAttention) -> bool:
    """Whether to attend to all keys under the routing graph's mask.

    In the routed form a region of fewer than 16 tokens leaves rows of its tile empty, and its list is too
    short for prologue and epilogue to pay. Issue slots, from instructions counted for sm_90 (float16, heads
    of 32, LePE in the forward), with K = topk x S_kv, M = P_kv x S_kv, and queries rounded up to 128:

    | kernel, tile of the masked form | routed, per region | masked, per query |
    |---|---|---|
    | forward, 128 x 64 | 44,000 + 190 x K | 1,800 + 7.8 x M |
    | dQ, 128 x 32 | 22,000 + 167 x K | 1,000 + 8.6 x M |
    | dK/dV, 128 x 32 | 29,000 + 199 x K | 1,000 + 10.1 x M |

    The rule below serves all three kernels and favours the routed form. On an H200 a forward's kernels take
    55 us masked (docs/kernel_times.md) and at best 73 us routed (docs/measured) at BiFormer's third stage. On
    an H100, too, the masked form was the fastest there, compared with the routed and small_map forms.

    Results differ if a key or value is not finite: in the masked form it also reaches queries whose regions
    did not choose it, since neither the mask nor a weight of 0 turns infinity or NaN into 0.

    BiFormer's third stage (4 tokens, 16 of 49 regions) is masked; YOLO's last map (9 tokens, 4 of 64) is not.
    """
    grid, kv_grid = problem.query_grid, problem.kv_grid
    fits = (
        problem.distinct
        and problem.factor is None
        and problem.scale >= LEAST_SCALE
        and problem.query.dtype.itemsize == 2
        and max(problem.qk_head_dim, problem.v_head_dim) <= 32
        and kv_grid.n_regions <= MOST_KEY_REGIONS
        and max(grid.region_tokens, kv_grid.region_tokens) <= MOST_REGION_TOKENS
    )
    rows = cdiv(grid.n_regions * grid.region_tokens, ROUNDED_TO) * ROUNDED_TO
    masked = rows * (kv_grid.n_regions * kv_grid.region_tokens + 200)
    routed = grid.n_regions * (3000 + 20 * problem.topk * kv_grid.region_tokens)
    return fits and masked <= routed
