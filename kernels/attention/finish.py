"""The kernel that ends a backward: it adds up LePE's shares, and the partial sums of dK and dV.

| array | shape | meaning |
|---|---|---|
| pieces, results | | see `arguments.Pieces` and `arguments.KeyValueResults` |
| shares, sums | | shares: see `lepe.convolution`; sums: where they go, see `lepe.arguments.LepeSums` |
"""

import triton
import triton.language as tl

from ..lepe.convolution import sum_lepe_shares
from .key_value_gradient import sum_pieces


@triton.jit(
    do_not_specialize=[
        *("kv_tokens", "n_regions", "n_partials", "region_tokens", "longest"),
        *("n_shares", "n_sums"),
    ]
)
def finish_gradients_kernel(
    pieces,
    results,
    shares,
    sums,
    kv_tokens,
    n_regions,
    n_partials,
    region_tokens,
    longest,
    n_shares,
    n_sums,
    CONFIG: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Sums LePE's shares (the first `n_sums` programs, which take longest) and pieces of rows (the rest)."""
    program = tl.program_id(0)
    if shares is not None:  # noqa: SIM102  the compiler evaluates this condition, the program the next
        if program < n_sums:
            sum_lepe_shares(program, shares, sums, n_shares, SUMS)
    if SUMS.HAS_PIECES:  # noqa: SIM102
        if program >= n_sums:
            sum_pieces(
                program - n_sums,
                pieces,
                results,
                kv_tokens,
                n_regions,
                n_partials,
                region_tokens,
                longest,
                CONFIG,
            )
