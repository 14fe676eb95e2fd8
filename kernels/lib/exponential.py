"""Base-2 exponentials, some of them computed without the exponential unit.

A GPU (sm_80 and later) issues eight instructions in the time of one exponential. With heads of 32 channels an
attention loop needs only six or seven instructions per score, so the exponential unit limits its speed. As in
FlashAttention-4, some of the exponentials can be evaluated by multiply-adds instead, in eight instructions
each.
"""

import math

import triton
import triton.language as tl

# Factor of a logit whose exponential is taken to base 2 instead of base e; launches include it in the scale.
LOG2_E = math.log2(math.e)

# 1.5 * 2**23: the sum of this and x has the integer nearest to x in its lowest bits, for |x| < 2**22.
_TO_INTEGER = tl.constexpr(12582912.0)
# The largest SHARE is 2 to the power of this number.
_MOST_HALVINGS = tl.constexpr(8)
# The lowest finite number of float32.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp2(x, SHARE: tl.constexpr):
    """2**x of a tile (rows, columns) of fp32; x is at most about 0.

    One in SHARE columns is evaluated by multiply-adds, with a relative error of 7.5e-5: a seventh of the
    error of rounding to float16. SHARE is a power of two; 0 means none.

    The multiply-adds turn -inf into 2**-126, and the NaN that NVIDIA's units make (0x7FFFFFFF) into the
    largest finite number. To guard against NaN here would cost an instruction per number. A kernel that must
    detect NaN takes its maxima by `larger_or_nan` instead, which costs no more than a maximum that drops NaN.
    """
    if SHARE == 0:
        return tl.exp2(x)
    elif SHARE == 1:
        return _exp2_by_polynomial(x)
    else:
        left, right = _last_halves(x, SHARE)
        powers = _side_by_side(tl.exp2(left), _exp2_by_polynomial(right))
        # A loop, because Triton 3.4 cannot compile a function that calls itself.
        for level in tl.static_range(_MOST_HALVINGS):
            if (2 << level) < SHARE:
                left, _ = _last_halves(x, SHARE >> (level + 1))
                powers = _side_by_side(tl.exp2(left), powers)
        return powers


@triton.jit
def larger_or_nan(a, b):
    """The larger of two numbers, NaN if one of them is NaN; `tl.max` and `tl.maximum` drop NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _last_halves(x, SHARE: tl.constexpr):
    """Cuts the columns of `x` into SHARE equal parts and returns the last two."""
    left = x
    right = x
    for level in tl.static_range(_MOST_HALVINGS):
        if (2 << level) <= SHARE:
            # Splits into the left and the right half of the columns, not into even and odd columns. Either
            # way the numbers stay in the registers that hold them.
            halves = tl.reshape(right, (right.shape[0], 2, right.shape[1] // 2))
            left, right = tl.split(tl.permute(halves, (0, 2, 1)))
    return left, right


@triton.jit
def _side_by_side(left, right):
    """Joins two tiles (rows, columns) to one (rows, 2 * columns)."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _exp2_by_polynomial(x):
    """2**x: splits x into the nearest integer and a rest in [-1/2, 1/2].

    A minimax polynomial gives 2**rest; the integer is added to the bits of its exponent.
    """
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + _TO_INTEGER
    rest = x - (shifted - _TO_INTEGER)
    power = ((0.05517167 * rest + 0.24261113) * rest + 0.69326097) * rest + 0.99992806
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
