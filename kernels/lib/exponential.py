"""Base-2 exponentials, some of them off the exponential unit.

A GPU (sm_80 and later) issues eight instructions in the time of one exponential. An attention loop at heads
of 32 needs six or seven a score, so that the exponential unit binds. As in FlashAttention-4, a share of the
exponentials can be evaluated by multiply-adds instead, each in eight instructions.
"""

import triton
import triton.language as tl

# 1.5 * 2**23: added to a number of at most 22 bits, it leaves the nearest integer in the lowest bits.
_TO_INTEGER = tl.constexpr(12582912.0)
# SHARE is at most 2 to this power.
_MOST_HALVINGS = tl.constexpr(8)


@triton.jit
def exp2(x, SHARE: tl.constexpr):
    """2**x of a tile (rows, columns) of fp32, x at most about 0.

    One in SHARE columns, a power of two, is evaluated by multiply-adds, with a relative error of 7.5e-5: a
    seventh of what rounding to float16 costs. 0 stands for none.
    """
    if SHARE == 0:
        return tl.exp2(x)
    elif SHARE == 1:
        return _exp2_by_polynomial(x)
    else:
        left, right = _last_halves(x, SHARE)
        powers = _side_by_side(tl.exp2(left), _exp2_by_polynomial(right))
        # A loop, since Triton 3.4 cannot compile a function that calls itself.
        for level in tl.static_range(_MOST_HALVINGS):
            if (2 << level) < SHARE:
                left, _ = _last_halves(x, SHARE >> (level + 1))
                powers = _side_by_side(tl.exp2(left), powers)
        return powers


@triton.jit
def _last_halves(x, SHARE: tl.constexpr):
    """The last two of `x`'s SHARE equal parts by columns."""
    left = x
    right = x
    for level in tl.static_range(_MOST_HALVINGS):
        if (2 << level) <= SHARE:
            # Halves of the columns, not alternate ones: those lie in the same registers either way.
            halves = tl.reshape(right, (right.shape[0], 2, right.shape[1] // 2))
            left, right = tl.split(tl.permute(halves, (0, 2, 1)))
    return left, right


@triton.jit
def _side_by_side(left, right):
    """One tile (rows, 2 * columns) of two (rows, columns)."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _exp2_by_polynomial(x):
    """2**x: the integer part goes to the exponent's bits, the rest to a minimax polynomial on [-1/2, 1/2]."""
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + _TO_INTEGER
    rest = x - (shifted - _TO_INTEGER)
    power = ((0.05517167 * rest + 0.24261113) * rest + 0.69326097) * rest + 0.99992806
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
