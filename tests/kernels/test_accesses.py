"""The check of memory accesses, which the tests of this folder run under (`conftest.py`), finds faults."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter's accesses are checked")


@triton.jit
def _copy_kernel(x, out, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < length, other=0.0), mask=at < length)


@triton.jit
def _count_kernel(x):
    tl.store(x, 1.0)


@triton.jit
def _shift_kernel(x, STEP: tl.constexpr):
    at = tl.program_id(0) + 1
    tl.store(x + at, tl.load(x + at + STEP))


@triton.jit
def _last_adds_kernel(x):
    total = tl.load(x) + 1.0
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x, total)


@triton.jit
def _reverse_kernel(x, out, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 1.0)
    if WAITS:
        tl.debug_barrier()
    tl.store(out + at, tl.load(x + BLOCK - 1 - at))


def test_accesses_of_other_elements_pass():
    """Of arrays that overlap, as slices of a packed map do; the last program is not full."""
    packed = torch.randn(12)
    _copy_kernel[(2,)](packed[:7], packed[6:], 6, BLOCK=4)
    assert torch.equal(packed[:6], packed[6:])


@pytest.mark.parametrize("lacks", ["x", "out"])
def test_an_address_past_an_array_is_found(lacks):
    sizes = {"x": 8, "out": 8} | {lacks: 7}
    # One allocation: the address belongs to this process, and the access would pass.
    memory = torch.zeros(32)
    with pytest.raises(Exception, match="1 of 4 addresses lie outside"):
        _copy_kernel[(2,)](memory[: sizes["x"]], memory[16 : 16 + sizes["out"]], 8, BLOCK=4)


def test_an_element_that_two_programs_write_is_found():
    """Also if they write the same value."""
    with pytest.raises(Exception, match="written that another program has written"):
        _count_kernel[(2,)](torch.zeros(1))


@pytest.mark.parametrize(
    ("step", "fault"),
    [(-1, "read that another program has written"), (1, "written that another program has read")],
)
def test_an_element_that_one_program_reads_and_another_writes_is_found(step, fault):
    """Whichever of the two the interpreter runs first."""
    with pytest.raises(Exception, match=fault):
        _shift_kernel[(2,)](torch.zeros(4), STEP=step)


def test_an_element_that_all_read_and_one_writes_is_found():
    """Although the program that writes it is the last that has read it."""
    with pytest.raises(Exception, match="written that another program has read"):
        _last_adds_kernel[(2,)](torch.zeros(1))


def test_what_threads_exchange_needs_a_barrier():
    x, out = torch.zeros(4), torch.zeros(4)
    _reverse_kernel[(1,)](x, out, BLOCK=4, WAITS=True)
    with pytest.raises(
        Exception, match="4 of 4 elements are read after they were written, without a barrier"
    ):
        _reverse_kernel[(1,)](x, out, BLOCK=4, WAITS=False)
