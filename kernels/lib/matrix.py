"""Matrix products of tiles, used by every attention kernel."""

import triton
import triton.language as tl

# Triton's interpreter stores a bfloat16 number as an integer with the same bits and would multiply these
# integers. Converting the numbers to float32 first makes their products exact.
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """`a @ b` of half-precision or float32 tiles, in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_matmul(total, a, b, PRECISION: tl.constexpr):
    """`total + a @ b`, with `a` rounded to the type of `b`."""
    a = a.to(b.dtype)
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
