"""The index arithmetic of the kernels, against Python's."""

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from bra_triton.kernels.addressing import advance, list_position, token_of
from bra_triton.kernels.region_grid import RegionGrid


@triton.jit
def _walk(slots, tokens, steps, region_height, region_width, N_WIN: tl.constexpr, BLOCK: tl.constexpr):
    """Walks a list whose slot t is region t, and notes slot and token of every position."""
    slot, row, column = list_position(tl.arange(0, BLOCK), region_height, region_width)
    slot_step, row_step, column_step = list_position(BLOCK, region_height, region_width)
    for step in range(steps):
        at = step * BLOCK + tl.arange(0, BLOCK)
        tl.store(slots + at, slot)
        tl.store(
            tokens + at, token_of(slot % (N_WIN * N_WIN), row, column, region_height, region_width, N_WIN)
        )
        slot, row, column = advance(
            slot, row, column, slot_step, row_step, column_step, region_height, region_width
        )


@settings(max_examples=40, deadline=None)
@given(
    region_height=st.integers(1, 23),
    region_width=st.integers(1, 23),
    n_win=st.integers(1, 5),
    block=st.sampled_from([16, 32, 64, 128]),
)
def test_advancing_digit_by_digit_equals_division(region_height, region_width, n_win, block):
    steps = 4
    slots = torch.empty(steps * block, dtype=torch.int32)
    tokens = torch.empty_like(slots)
    _walk[(1,)](slots, tokens, steps, region_height, region_width, N_WIN=n_win, BLOCK=block)
    grid = RegionGrid.of_windows(n_win * region_height, n_win * region_width, n_win)
    positions = [divmod(index, grid.region_tokens) for index in range(steps * block)]
    assert slots.tolist() == [slot for slot, _ in positions]
    assert tokens.tolist() == [grid.token(slot % grid.n_regions, index) for slot, index in positions]
