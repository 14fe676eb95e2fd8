"""The region arithmetic, property by property."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bra_triton.kernels.grid import RegionGrid

sides = st.integers(1, 12)


@given(height=sides, width=sides, n_win=sides)
def test_every_token_of_the_map_lies_in_exactly_one_region(height, width, n_win):
    grid = RegionGrid.of_windows(height, width, n_win)
    tokens = [grid.token(r, s) for r in range(grid.n_regions) for s in range(grid.region_tokens)]
    assert sorted(t for t in tokens if t is not None) == list(range(height * width))


@given(height=sides, width=sides, region_size=st.tuples(sides, sides))
def test_regions_of_a_given_size_cover_the_map_and_no_row_or_column_is_all_padding(
    height, width, region_size
):
    grid = RegionGrid.of_region_size(height, width, region_size)
    tokens = [grid.token(r, s) for r in range(grid.n_regions) for s in range(grid.region_tokens)]
    assert sorted(t for t in tokens if t is not None) == list(range(height * width))
    assert grid.padding[0] < region_size[0]
    assert grid.padding[1] < region_size[1]


@given(n_win=sides, region_height=sides, region_width=sides)
def test_token_agrees_with_a_permuted_view(n_win, region_height, region_width):
    grid = RegionGrid.of_windows(n_win * region_height, n_win * region_width, n_win)
    position = torch.arange(grid.height * grid.width).view(n_win, region_height, n_win, region_width)
    expected = position.permute(0, 2, 1, 3).reshape(grid.n_regions, grid.region_tokens)
    region, index = grid.n_regions - 1, grid.region_tokens // 2
    assert grid.token(region, index) == expected[region, index]


@given(height=st.integers(1, 700), width=st.integers(1, 700), n_win=st.integers(1, 64))
def test_padding_is_the_least_that_divides(height, width, n_win):
    padding = RegionGrid.of_windows(height, width, n_win).padding
    for side, added in zip((height, width), padding, strict=True):
        assert 0 <= added < n_win
        assert (side + added) % n_win == 0


@given(height=sides, width=sides, n_win=sides)
def test_merged_grids_hold_the_same_tokens_and_padding(height, width, n_win):
    grid = RegionGrid.of_windows(height, width, n_win)
    one, each = (
        [g.token(r, s) for r in range(g.n_regions) for s in range(g.region_tokens)]
        for g in (grid.merged, grid)
    )
    assert grid.merged.n_regions == 1
    assert sorted(one, key=str) == sorted(each, key=str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 21, 7, False), r"multiples of n_win=7, got 20 x 21"),
        ((0, 7, 7, False), r"at least 7 x 7 tokens with n_win=7 and auto_pad=False, got 0 x 7"),
        ((0, 7, 7, True), r"at least 1 x 1 tokens with n_win=7 and auto_pad=True, got 0 x 7"),
        ((7, 7, 0, True), r"n_win must be at least 1, got 0"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionGrid.of_windows(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 4, 3, 2, 2), r"2 regions of 3 do not cover a width of 8"),
        ((8, 8, 4, 4, 0, 2), r"the map's height, .* must be at least 1, got 8, 4 and 0"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegionGrid(*arguments)


def test_impossible_region_sizes_are_refused():
    with pytest.raises(ValueError, match=r"region_size must be at least \(1, 1\), got \(0, 4\)"):
        RegionGrid.of_region_size(8, 8, (0, 4))
