"""Integer arithmetic of grids and launches, in plain Python.

Triton has `cdiv` and `next_power_of_2`, too, but each call of Triton's outside a kernel takes 1.5 us.
"""


def cdiv(x: int, y: int) -> int:
    """`x / y`, rounded up; both are positive."""
    # Not -(-x // y): in an exported graph sizes are tensors, and ONNX rounds their quotient towards zero.
    return (x + y - 1) // y


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least `x`; `x` is at least 1."""
    return 1 << (x - 1).bit_length()


INVERSE_BITS = 18


def inverse(divisor: int) -> int:
    """Factor that replaces a division: `x // divisor == x * inverse(divisor) >> INVERSE_BITS`.

    The equality holds where `x * divisor < 2**18`; the product then fits a signed 32-bit integer if also
    `x < 2**13 * divisor`.
    """
    return cdiv(1 << INVERSE_BITS, divisor)
