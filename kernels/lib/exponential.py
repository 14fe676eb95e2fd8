"""Base-2 exponentials, some of them off the exponential unit.

A GPU (sm_80 and later) issues eight instructions in the time of one exponential. An attention loop at heads
of 32 needs six or seven a score, so that the exponential unit binds. As in FlashAttention-4, a share of the
exponentials can be evaluated by multiply-adds instead, each in eight instructions.
"""

import triton
import triton.language as tl

# 1.5 * 2**23: added to a number of at most 22 bits, it leaves the nearest integer in the lowest bits.
_TO_INTEGER = tl.constexpr(12582912.0)


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
        rows: tl.constexpr = x.shape[0]
        columns: tl.constexpr = x.shape[1]
        # Halves of the columns, not alternate ones: those lie in the same registers either way.
        halves = tl.permute(tl.reshape(x, (rows, 2, columns // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        powers = tl.join(tl.exp2(left), exp2(right, SHARE // 2))
        return tl.reshape(tl.permute(powers, (0, 2, 1)), (rows, columns))


@triton.jit
def _exp2_by_polynomial(x):
    """2**x: the integer part goes to the exponent's bits, the rest to a minimax polynomial on [-1/2, 1/2]."""
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + _TO_INTEGER
    rest = x - (shifted - _TO_INTEGER)
    power = ((0.05517167 * rest + 0.24261113) * rest + 0.69326097) * rest + 0.99992806
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
