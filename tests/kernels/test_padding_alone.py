"""Programs of regions that are only padding process no keys; the results would be equal if they did."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from properties import profile

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.lib.addressing import walked_length
from bra_triton.kernels.lib.integers import inverse
from bra_triton.kernels.small_map.launch import SmallMapConfig
from bra_triton.kernels.small_map.tokens import keys_of

KEYS = 12
CONFIG = SmallMapConfig(*(1,) * len(SmallMapConfig._fields))


@triton.jit
def _walked_kernel(region_list, found, region_tokens, n_keys):
    region = tl.program_id(0)
    tl.store(found + region, walked_length(region_list, region, region_tokens, n_keys))


@triton.jit
def _keys_kernel(
    found,
    height,
    width,
    columns,
    map_height,
    map_width,
    of_width,
    of_columns,
    CONFIG: tl.constexpr,
):
    region = tl.program_id(0)
    grid = (height, width, columns, map_height, map_width, 0, of_width, of_columns)
    tl.store(found + region, keys_of(region, 4, grid, (3, 1), CONFIG))


def _expected(grid):
    return [KEYS if grid.token(region, 0) is not None else 0 for region in range(grid.n_regions)]


grids = st.builds(RegionGrid.of_windows, *[st.integers(1, 20)] * 2, st.tuples(*[st.integers(1, 8)] * 2))


@profile(20)
@given(grid=grids)
def test_programs_with_lists(grid, device):
    tokens = [[grid.token(r, i) for i in range(grid.region_tokens)] for r in range(grid.n_regions)]
    listed = torch.tensor([[-1 if x is None else x for x in row] for row in tokens], dtype=torch.int32)
    found = torch.full((grid.n_regions,), -1, dtype=torch.int32, device=device)
    _walked_kernel[(grid.n_regions,)](listed.to(device), found, grid.region_tokens, KEYS)
    assert found.tolist() == _expected(grid)


@pytest.mark.parametrize("is_padded", [True, False])
@profile(20)
@given(grid=grids)
def test_programs_of_small_maps(grid, is_padded, device):
    found = torch.full((grid.n_regions,), -1, dtype=torch.int32, device=device)
    config = CONFIG._replace(QUERY_IS_PADDED=is_padded)
    _keys_kernel[(grid.n_regions,)](
        found, *grid.geometry, inverse(grid.region_width), inverse(grid.columns), config
    )
    assert found.tolist() == (_expected(grid) if is_padded else [KEYS] * grid.n_regions)
