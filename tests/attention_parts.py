"""Small attention problems; together they cover every part of which the modes of the attention are made."""

from dataclasses import dataclass

import attention_oracle
import torch
from problems import relative_error

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import Padding, RoutedAttention


@dataclass(frozen=True)
class Part:
    """One small problem, and the reason why it is tested."""

    why: str
    grid: RegionGrid
    kv_grid: RegionGrid | None = None
    num_heads: int = 2
    head_dims: tuple[int, int] = (16, 16)
    topk: int = 2
    head_graphs: bool = False
    factor: bool = False
    needs_factor: bool = False
    all_choose: int | None = None
    batch: int = 1
    masked: bool = False
    whole: bool = False


def windows(height, width, n_win):
    return RegionGrid.of_windows(height, width, n_win)


PARTS = {
    "packed": Part("the plain mode: slices of one packed map", windows(8, 12, 2), batch=2),
    "padding": Part(
        "rows and columns of padding, and a row of regions that are nothing else",
        windows(5, 10, 4),
        num_heads=1,
    ),
    "soft": Part("factor of keys and values", windows(8, 8, 2), factor=True, needs_factor=True, topk=3),
    "hard": Part(
        "gradient of the factor in hard routing, where the forward has none",
        windows(8, 8, 2),
        needs_factor=True,
        topk=3,
    ),
    "frozen_soft": Part("a factor that needs no gradient", windows(4, 4, 2), factor=True),
    "head_graphs": Part(
        "a graph for every head, with factor",
        windows(8, 8, 2),
        head_graphs=True,
        factor=True,
        needs_factor=True,
    ),
    "kv_grid": Part(
        "keys on a grid of another size and number of regions, both padded",
        RegionGrid.of_region_size(7, 9, (3, 4)),
        RegionGrid.of_region_size(5, 6, (2, 2)),
        head_dims=(5, 6),
        head_graphs=True,
        batch=2,
    ),
    "pooled": Part("one key a region", windows(6, 6, 3), windows(3, 3, 3), topk=4, factor=True),
    "long_row": Part(
        "one region that all choose: its row is cut", windows(6, 6, 6), all_choose=3, num_heads=1
    ),
    "long_padded_row": Part(
        "the cut row's region has padding, which the sum of pieces must not lose",
        windows(9, 10, 5),
        num_heads=1,
        all_choose=24,
        factor=True,
        needs_factor=True,
    ),
    "masked": Part("small regions, all in one tile, two images", windows(6, 6, 3), batch=2, masked=True),
    "masked_padding": Part(
        "padding in queries and keys, regions of padding alone; 36 key regions, so wide marks",
        windows(11, 8, 6),
        masked=True,
    ),
    "masked_far_keys": Part(
        "the one chosen region's keys lie in the last tile: the tiles before it have none",
        windows(12, 12, 6),
        num_heads=1,
        topk=1,
        all_choose=35,
        masked=True,
    ),
    "masked_kv_grid": Part(
        "keys on another grid, heads of other widths, a graph for every head",
        RegionGrid.of_region_size(7, 9, (3, 4)),
        RegionGrid.of_region_size(5, 6, (2, 2)),
        head_dims=(5, 20),
        head_graphs=True,
        batch=2,
        masked=True,
    ),
    "whole": Part("all regions attend to all: dense attention", windows(6, 8, 2), batch=2, whole=True),
    "whole_padding": Part(
        "dense attention with rows and columns of padding, queries and keys",
        windows(7, 10, 4),
        head_dims=(5, 20),
        batch=2,
        whole=True,
    ),
    "whole_kv_grid": Part(
        "dense attention to pooled keys", windows(7, 7, 3), windows(6, 6, 3), num_heads=1, whole=True
    ),
    "packed_16": Part("regions of 16 keys: a step of 16 takes one region", windows(8, 8, 2), num_heads=1),
    "whole_16": Part(
        "regions of 16 keys; every region attends to all", windows(8, 8, 2), num_heads=1, whole=True
    ),
    "unequal_heads": Part(
        "heads of 5 and 20: tiles of 16 and 32 channels", windows(4, 6, 2), head_dims=(5, 20)
    ),
}


def make(part, device, dtype=torch.float32):
    """A random problem whose maps are slices of packed maps, like those that the modules pass on."""
    num_heads, (qk, v) = part.num_heads, part.head_dims
    widths = [num_heads * qk, num_heads * qk, num_heads * v]

    def packed(grid, widths):
        shape = (part.batch, grid.height, grid.width, sum(widths))
        return torch.randn(shape, device=device).to(dtype).split(widths, -1)

    query, key, value = packed(part.grid, widths)
    kv_grid = part.kv_grid or part.grid
    if part.kv_grid:
        key, value = packed(kv_grid, widths[1:])
    n_graphs = num_heads if part.head_graphs else 1
    shape = (part.batch, n_graphs, part.grid.n_regions)
    r_idx = torch.rand(*shape, kv_grid.n_regions, device=device).argsort(-1)[..., : part.topk].int()
    if part.all_choose is not None:
        r_idx[..., 0] = part.all_choose
        r_idx[..., 1:] %= part.all_choose
    factor = torch.rand(r_idx.shape, device=device) + 0.5 if part.factor else None
    padding = None
    if kv_grid.is_padded:
        padding = Padding(*(torch.randn(w, device=device).to(dtype) for w in widths[1:]))
    if part.whole:
        grids = part.grid.merged, kv_grid.merged
        return RoutedAttention(query, key, value, None, *grids, num_heads, qk**-0.5, None, padding)
    return RoutedAttention(
        query, key, value, r_idx.contiguous(), part.grid, kv_grid, num_heads, qk**-0.5, factor, padding
    )


def compare(backend, problem, needs_factor):
    """Relative errors of a backend's output and gradients, by name, against the oracle in float64."""
    grad_out = torch.randn(*problem.query.shape[:3], problem.value.shape[-1]).to(problem.query)
    actual = attention_oracle.run_backend(backend, problem, grad_out, needs_factor)
    expected = attention_oracle.gradients(problem, grad_out, needs_factor)
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}
