"""The region arithmetic, property by property."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bra_triton.region_grid import RegionGrid, padding_to_multiple
from bra_triton.spec import AttentionSpec

sides = st.integers(1, 12)


@given(n_win=sides, region_height=sides, region_width=sides)
def test_every_token_lies_in_exactly_one_region(n_win, region_height, region_width):
    grid = RegionGrid(n_win * region_height, n_win * region_width, n_win)
    tokens = [grid.token(r, s) for r in range(grid.n_regions) for s in range(grid.region_tokens)]
    assert sorted(tokens) == list(range(grid.height * grid.width))


@given(n_win=sides, region_height=sides, region_width=sides)
def test_token_agrees_with_a_permuted_view(n_win, region_height, region_width):
    grid = RegionGrid(n_win * region_height, n_win * region_width, n_win)
    position = torch.arange(grid.height * grid.width).view(n_win, region_height, n_win, region_width)
    expected = position.permute(0, 2, 1, 3).reshape(grid.n_regions, grid.region_tokens)
    region, index = grid.n_regions - 1, grid.region_tokens // 2
    assert grid.token(region, index) == expected[region, index]


@given(height=st.integers(1, 700), width=st.integers(1, 700), n_win=st.integers(1, 64))
def test_padding_is_the_least_that_divides(height, width, n_win):
    bottom, right = padding_to_multiple(height, width, n_win)
    for side, padding in ((height, bottom), (width, right)):
        assert 0 <= padding < n_win
        assert (side + padding) % n_win == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 21, 7), r"multiples of n_win=7, got 20 x 21"),
        ((0, 7, 7), r"needs a token, got a map of 0 x 7"),
        ((7, 7, 0), r"n_win must be at least 1, got 0"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionGrid(*arguments)


def test_spec_defaults_scale_to_all_heads_together():
    assert AttentionSpec(64, 16, 4, 7, 4).scale == 0.25
    assert AttentionSpec(64, 16, 4, 7, 4, qk_scale=2.0).scale == 2.0
