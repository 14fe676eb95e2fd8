"""The cases in which attention over given regions is tested, and the reason for each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.problem import RoutedAttention
from bra_triton.operators import regional as operators


@dataclass(frozen=True)
class RegionalCase:
    """One attention over NCHW maps with a graph per head."""

    name: str
    why: str
    size: tuple[int, int]
    region_size: tuple[int, int]
    num_heads: int = 2
    head_dim: int = 8
    topk: int = 2
    batch: int = 1
    kv_size: tuple[int, int] | None = None
    kv_region_size: tuple[int, int] | None = None
    value_head_dim: int | None = None
    scale: float = 0.5

    @property
    def query_grid(self) -> RegionGrid:
        return RegionGrid.of_region_size(*self.size, self.region_size)

    @property
    def kv_grid(self) -> RegionGrid:
        return RegionGrid.of_region_size(
            *(self.kv_size or self.size), self.kv_region_size or self.region_size
        )

    def maps(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value in float64, contiguous, of numbers that float32 holds exactly."""
        channels = self.num_heads * self.head_dim
        value_channels = self.num_heads * (self.value_head_dim or self.head_dim)
        kv_size = self.kv_size or self.size
        shapes = ((channels, *self.size), (channels, *kv_size), (value_channels, *kv_size))
        return tuple(torch.randn(self.batch, *shape, generator=generator).double() for shape in shapes)

    def graph(self) -> Tensor:
        """A random graph per head, `(N, num_heads, P, topk)` int64; no region is twice in a row."""
        shape = (self.batch, self.num_heads, self.query_grid.n_regions, self.kv_grid.n_regions)
        return torch.rand(shape).argsort(-1)[..., : self.topk]

    @property
    def numbers(self) -> dict[str, object]:
        return {"region_size": self.region_size, "kv_region_size": self.kv_region_size}


REGIONAL_CASES = [
    RegionalCase("whole", "regions divide the map", (6, 8), (3, 4)),
    RegionalCase("padded", "rows and columns of padding, in queries and keys", (7, 9), (3, 4), topk=3),
    RegionalCase(
        "padded_right", "padding at the right alone: rows and columns must not be swapped", (6, 7), (3, 4)
    ),
    RegionalCase("padded_more_than_half", "a last region that is mostly padding", (5, 5), (4, 4), topk=4),
    RegionalCase("batch", "two images, neither may see the other", (4, 6), (2, 3), batch=2),
    RegionalCase(
        "other_keys",
        "keys on a map and regions of another size and number; only they are padded",
        (4, 6),
        (2, 3),
        kv_size=(5, 4),
        kv_region_size=(2, 2),
        topk=4,
    ),
    RegionalCase(
        "other_region_size", "the same map under larger key regions", (6, 6), (2, 2), kv_region_size=(3, 3)
    ),
    RegionalCase("value_wider", "values wider than keys", (4, 4), (2, 2), value_head_dim=12),
    RegionalCase("all_regions", "every region is chosen: dense attention", (4, 6), (2, 2), topk=6),
    RegionalCase("one_token", "regions of one token, one head", (3, 4), (1, 1), num_heads=1, topk=5),
    RegionalCase(
        "many_regions",
        "66 regions a side, more than n_win may be: only the router's kernel has a limit",
        (66, 1),
        (1, 1),
        num_heads=1,
    ),
    RegionalCase(
        "negative", "a negative scale, which turns the order of the scores", (4, 6), (2, 3), scale=-0.5
    ),
    RegionalCase("one_region", "a region larger than the map", (3, 4), (5, 6), topk=1),
    RegionalCase(
        "head_5", "heads of 5, rows not aligned to 16 bytes", (4, 4), (2, 2), num_heads=3, head_dim=5
    ),
]
REGIONAL_CASES_BY_NAME = {case.name: case for case in REGIONAL_CASES}


def log_problems(monkeypatch) -> list[RoutedAttention]:
    """Returns a list, to which every problem is added that a backend gets from now on."""
    problems = []
    problem_of = operators._problem

    def log(*arguments):
        problem, backend = problem_of(*arguments)
        problems.append(problem)
        return problem, backend

    monkeypatch.setattr(operators, "_problem", log)
    return problems
