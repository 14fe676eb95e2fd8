"""The forms of an attention, and the choice between them. Does not import Triton.

An attention has one of four forms. "routed": every region has a list of the tokens that it attends to.
"masked": all regions attend to all tokens, and marks mask the tokens that a region did not choose. "whole":
the map is one region, which attends to itself. "small_map": each program chooses its regions and computes
their tokens without a list, see `small_map`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from . import overrides
from .arrays import A
from .lib.integers import cdiv
from .problem import RoutedAttention
from .tiles import channel_block

ROUTED, MASKED, WHOLE, SMALL_MAP = "routed", "masked", "whole", "small_map"

# Masked attention: most key regions. Each adds a channel of marks to the product of queries and keys.
MOST_MASKED_REGIONS = 64
# Most tokens of a region; larger regions fill the routed kernels' tiles.
MOST_MASKED_TOKENS = 16
# Marks lower a logit by 2**126 * scale: with a smaller scale, keys that were not chosen might keep a weight.
LEAST_MASKED_SCALE = 2.0**-100
# Rows of the largest tile that owns queries or keys.
MASKED_ROWS = 128

# Small maps: most regions, because a program compares the logits of all regions in pairs.
MOST_SMALL_MAP_REGIONS = 64
# Most keys that a region attends to.
MOST_SMALL_MAP_KEYS = 256
# Rows of a program's tile, the fewest that a matrix product takes. It is also the most tokens of a region:
# lists are faster for larger regions. On an H100 they were faster with regions of 25 tokens, and not faster
# with regions of 16 (`bra-bench kernel-times`, with and without `--form routed`).
SMALL_MAP_ROWS = 16
# Most channels of a head, by bytes of an element: with twice as many the backward spills (compiled for sm_80
# and sm_90).
MOST_SMALL_MAP_CHANNELS = {2: 64, 4: 32}


def form_of(problem: RoutedAttention[A], routing_learns: bool = False, chooses: bool = False) -> str:
    """The form of an attention.

    Args:
        problem: the attention.
        routing_learns: whether the factor's gradient is asked for, which needs lists.
        chooses: whether routing chooses its regions; False if they are given.

    Raises:
        ValueError: if `use_form` has set a form that cannot serve.
    """
    if problem.r_idx is None:
        return WHOLE
    if routing_learns:
        return ROUTED
    if form := overrides.in_force().form:
        if form == SMALL_MAP and not (chooses and small_map_serves(problem)):
            raise ValueError(
                f"the form {SMALL_MAP!r} cannot serve {problem.query_grid} with topk {problem.topk}"
            )
        return form
    if masked_is_cheaper(problem):
        return MASKED
    return SMALL_MAP if chooses and small_map_serves(problem) else ROUTED


@contextmanager
def use_form(form: str | None) -> Iterator[None]:
    """Context in which attentions of this thread get `form`.

    With None each attention gets the form that is chosen for it. An attention keeps its form if no other is
    possible: if every region attends to all regions, or if the routing weights learn. The masked form must
    be able to serve: this is not checked.

    Raises:
        ValueError: for another name than "routed", "masked" and "small_map".
    """
    if form not in (None, ROUTED, MASKED, SMALL_MAP):
        raise ValueError(f"form must be {ROUTED!r}, {MASKED!r}, {SMALL_MAP!r} or None, got {form!r}")
    with overrides.use(form=form):
        yield


def masked_is_cheaper(problem: RoutedAttention[A]) -> bool:
    """Whether to attend to all keys under the routing graph's mask, instead of the routed regions' keys.

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
        and problem.scale >= LEAST_MASKED_SCALE
        and problem.query.dtype.itemsize == 2
        and max(problem.qk_head_dim, problem.v_head_dim) <= 32
        and kv_grid.n_regions <= MOST_MASKED_REGIONS
        and max(grid.region_tokens, kv_grid.region_tokens) <= MOST_MASKED_TOKENS
    )
    rows = cdiv(grid.n_regions * grid.region_tokens, MASKED_ROWS) * MASKED_ROWS
    masked = rows * (kv_grid.n_regions * kv_grid.region_tokens + 200)
    routed = grid.n_regions * (3000 + 20 * problem.topk * kv_grid.region_tokens)
    return fits and masked <= routed


def small_map_serves(problem: RoutedAttention[A]) -> bool:
    """Whether the kernels of small maps can compute an attention whose regions are still to be chosen."""
    widest = channel_block(max(problem.qk_head_dim, problem.v_head_dim))
    # Sizes of the map are only compared, not rounded: a compiler that traces sizes as symbols would treat a
    # size that is rounded as a constant.
    return (
        widest <= MOST_SMALL_MAP_CHANNELS[problem.query.dtype.itemsize]
        and problem.query_grid.region_tokens <= SMALL_MAP_ROWS
        and problem.kv_grid.region_tokens <= SMALL_MAP_ROWS
        and problem.kv_grid.n_regions <= MOST_SMALL_MAP_REGIONS
        and problem.topk * problem.kv_grid.region_tokens <= MOST_SMALL_MAP_KEYS
    )
