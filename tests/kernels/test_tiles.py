"""The tile table and the choice from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bra_triton.kernels import tiles

KERNELS = (tiles.FORWARD, tiles.QUERY_GRADIENT, tiles.KEY_VALUE_GRADIENT)


@given(
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    head_dim=st.integers(1, 256),
    region_tokens=st.integers(1, 6035),
)
def test_every_problem_has_a_tile_that_wastes_less_than_half_of_it(kernel, dtype, head_dim, region_tokens):
    tile = tiles.choose(kernel, dtype, head_dim, region_tokens)
    rows = -(-region_tokens // tile.own) * tile.own
    assert tile.own == 16 or rows < 2 * region_tokens


@pytest.mark.parametrize("key", tiles.TABLE)
def test_the_table_is_sorted_and_made_of_powers_of_two(key):
    assert list(tiles.TABLE[key]) == sorted(tiles.TABLE[key])
    assert max(tiles.TABLE[key]) == 256
    for row in tiles.TABLE[key].values():
        assert [tile.own for tile in row] == sorted({tile.own for tile in row})
        assert row[0].own == 16
        for tile in row:
            assert all(n & (n - 1) == 0 for n in (tile.own, tile.step, tile.num_warps))
            assert min(tile.own, tile.step) >= 16


@pytest.mark.parametrize(("head_dim", "block"), [(1, 16), (5, 16), (16, 16), (24, 32), (33, 64), (256, 256)])
def test_channel_block(head_dim, block):
    assert tiles.channel_block(head_dim) == block
