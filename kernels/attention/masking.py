"""When attention over the whole map under a mask is cheaper than walking the routed regions."""

from ..lib.integers import cdiv
from ..problem import RoutedAttention

# The graph's marks widen the first product by a channel for every key region.
MOST_KEY_REGIONS = 64
# Larger regions fill the routed kernels' tiles.
MOST_REGION_TOKENS = 16
# With a smaller scale what marks add to a score might leave a weight to keys that were not chosen.
LEAST_SCALE = 2.0**-100
# Rows of the largest tile that owns queries or keys.
ROUNDED_TO = 128


def is_cheaper(problem: RoutedAttention) -> bool:
    """Whether to attend to all keys under the routing graph's mask.

    A region of at most 16 tokens leaves most of a routed program's 16 rows empty, and its short list does not
    pay for prologue and epilogue: instructions counted for sm_90 (float16, heads of 32, LePE in the forward)
    say some 44,000 + 190 x topk x S_kv issue slots a region in the forward, 22,000 + 167 x and 29,000 + 199 x
    in the gradients. Masked, a query meets all P_kv x S_kv keys, in full tiles: 1,800 + 7.8 x (P_kv x S_kv)
    slots a query in the forward, 1,000 + 8.6 x and 1,000 + 10.1 x in the gradients (in tiles of 128 x 64 and
    128 x 32), queries rounded up to tiles of 128. The rule is one for all three kernels, on the side of the
    routed ones. On an H200 the kernels of a forward of BiFormer's third stage take 55 us masked
    (docs/kernel_times.md); a forward that is routed takes 73 at best (docs/measured). On an H100, too, the
    masked form was the fastest there, beside lists and the kernels of small maps.

    One thing differs: a key that is not finite reaches all queries of its head, times a weight of 0.

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
