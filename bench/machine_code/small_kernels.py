"""What a launch of a kernel around the attention has to do: bytes, and how often its loops run.

Routing, lists, the inverse graph, LePE and pooling have no matrix products and no tiles to tune. Their work
follows from the arguments of the launch alone, as the functions here say, one a kernel; two things are data:

- Pieces of rows of the inverse graph: no row is taken to be cut, as in the mean, so that `sum_pieces` has
  nothing to sum.
- Cells of a pooling: taken to be alike and to cover every region without overlap.

Bytes requested are those that the programs load and store, each where it asks; masked elements ask for
nothing. Of bytes moved every element counts once read and once written.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bra_triton.bench.machine_code.analysis import Analysis
from bra_triton.bench.machine_code.hardware import Hardware
from bra_triton.bench.machine_code.static_analysis import LoopMix
from bra_triton.kernels.lib.integers import cdiv

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """One launch.

    Attributes:
        turns: how often a program runs each loop of the kernel, in the order of the source; those that take
            a single turn whatever the arguments are left out, as the compiler leaves no loop of them.
        bytes_moved: bytes that the launch cannot avoid.
        bytes_requested: bytes that its programs ask for.
    """

    turns: tuple[int, ...]
    bytes_moved: int
    bytes_requested: int


@dataclass(frozen=True)
class SmallCost:
    """Prediction for one launch.

    Attributes:
        work: bytes and turns.
        programs: thread blocks.
        bounds: seconds by unit: issue, memory; without issue where the machine code has other loops than the
            source.
    """

    work: Work
    programs: int
    bounds: dict[str, float]

    @property
    def binding(self) -> str:
        """The unit that takes longest."""
        return max(self.bounds, key=self.bounds.__getitem__)

    @property
    def share_of_ideal(self) -> float:
        """Time for the bytes alone over that of the binding unit."""
        return self.bounds["memory"] / self.bounds[self.binding]


def predict_small(
    kernel: str, code: Analysis, grid: Sequence[int], arguments: Arguments, hardware: Hardware
) -> SmallCost:
    """Predicts a launch from its counted code; programs that leave early are taken to run to the end.

    Raises:
        ValueError: the kernel is unknown.
    """
    work, programs = work_of(kernel, grid, arguments), math.prod(grid)
    bounds = {"memory": work.bytes_moved / hardware.bandwidth}
    executed = executed_instructions(code, work.turns)
    if executed is not None:
        rounds = cdiv(programs, hardware.sms)
        slots = rounds * executed * 32 * code.num_warps
        bounds["issue"] = slots / hardware.issue_slots / hardware.clock
    return SmallCost(work, programs, bounds)


def executed_instructions(code: Analysis, turns: Sequence[int]) -> int | None:
    """Instructions of a warp that takes its loops so often; None where the loops are not those of the source.

    Loops keep their order. A loop that the compiler has unrolled is followed by one for the turns left over;
    of a loop of one or two turns it may leave none.
    """
    loops, left = list(code.loops), list(turns)
    while len(left) > len(loops) and min(left) <= 2:
        left.pop(max(index for index, count in enumerate(left) if count <= 2))
    n_unrolled = len(loops) - len(left)
    assert code.straight is not None  # as of every kernel but attention's
    total = code.straight.total
    for count in left:
        if not loops:
            return None
        body = loops.pop(0)
        factor = _unrolled_by(body, loops[0]) if n_unrolled and loops else 1
        if factor > 1:
            total += count % factor * loops.pop(0).total
            n_unrolled -= 1
        total += count // factor * body.total
    return None if loops or n_unrolled else total


def _unrolled_by(body: LoopMix, following: LoopMix) -> int:
    """How many turns of the loop that follows one turn of `body` makes up; 1 where they are no such pair."""
    many, one = (loop.counts["global_loads"] + loop.counts["global_stores"] for loop in (body, following))
    return many // one if one and many % one == 0 else 1


def work_of(kernel: str, grid: Sequence[int], arguments: Arguments) -> Work:
    """What a launch has to do.

    Args:
        kernel: a key of `WORK`.
        grid: programs along each axis.
        arguments: of the kernel by name, compile-time ones included. Tensors need no data.

    Raises:
        ValueError: the kernel is unknown.
    """
    if kernel not in WORK:
        raise ValueError(f"kernel is {kernel!r}; known are {', '.join(WORK)}")
    return WORK[kernel](grid, arguments)


# Routing ----------------------------------------------------------------------------------------------------


def _region_means(grid: Sequence[int], a: Arguments) -> Work:
    images, size = a["qkv"].shape[0], a["qkv"].element_size()
    tokens, row = a["height"] * a["width"], a["MEAN_DIM"] * size
    region_tokens = a["region_height"] * a["region_width"]
    means = images * a["n_regions"] * a["MEAN_DIM"] * 4
    has_padding = a["padding"] is not None
    padding_tokens = a["n_regions"] * region_tokens - tokens if has_padding else 0
    moved = images * tokens * row + (row if padding_tokens else 0) + means
    requested = images * (tokens + padding_tokens) * row + means
    return Work((cdiv(region_tokens, a["BLOCK_TOKENS"]),), moved, requested)


def _route(grid: Sequence[int], a: Arguments) -> Work:
    images, blocks = grid
    regions, row, topk = images * a["n_regions"], a["DIM"] * 4, a["topk"]
    channel_turns = cdiv(a["DIM"], a["BLOCK_C"])
    written = regions * topk * (4 + 4)
    turns = (topk,) if channel_turns == 1 else (channel_turns, topk)
    return Work(turns, 2 * regions * row + written, (1 + blocks) * regions * row + written)


def _sum_over_pairs(grid: Sequence[int], a: Arguments) -> Work:
    regions, blocks = grid
    pairs, row = regions * a["topk"], a["DIM"] * 4
    images = regions // a["n_regions"]
    moved = pairs * (4 + 4) + 2 * regions * row
    requested = blocks * pairs * (4 + 4) + (pairs + regions) * row
    if a["pairs"] is not None:
        moved += images * (a["n_regions"] + 1) * 4
        requested += blocks * regions * 2 * 4
    return Work((a["topk"],), moved, requested)


# Lists ------------------------------------------------------------------------------------------------------


def _list_tokens(grid: Sequence[int], a: Arguments) -> Work:
    region_tokens, entries = a["region_height"] * a["region_width"], a["n_entries"]
    lists = 1 if a["entry_factor"] is None else 2
    total = lists * entries * 4 * (1 + region_tokens) + a["n_regions"] * region_tokens * 4
    return Work((cdiv(region_tokens, a["BLOCK_TOKENS"]),), total, total)


def _mark_choices(grid: Sequence[int], a: Arguments) -> Work:
    marks = (a["n_rows"] + a["n_keys"]) * a["BLOCK_MARKS"] * 2
    total = a["n_rows"] * a["topk"] * 4 + marks + a["n_queries"] * 4
    return Work((a["topk"],), total, total)


def _invert_graph(grid: Sequence[int], a: Arguments) -> Work:
    programs, pairs = grid[0], a["n_pairs"]
    graphs = programs // a["n_regions"]
    written = graphs * 4 * (a["n_regions"] + 1 + pairs)
    turns = cdiv(pairs, a["BLOCK"])
    return Work((turns, turns), graphs * pairs * 4 + written, programs * 2 * pairs * 4 + written)


def _cut_rows(grid: Sequence[int], a: Arguments) -> Work:
    graphs, regions = grid[0], a["n_regions"]
    written = graphs * (regions * 4 * 4 + a["n_extras"] * 4)
    blocks = cdiv(regions, a["BLOCK"])
    turns = (blocks, blocks, cdiv(a["n_extras"], a["BLOCK"]))
    return Work(turns, graphs * (regions + 1) * 4 + written, graphs * 2 * regions * 4 + written)


def _sum_pieces(grid: Sequence[int], a: Arguments) -> Work:
    graphs = a["row_start"].shape[0] * a["row_start"].shape[1]
    return Work((0,), graphs * a["n_regions"] * 4, grid[0] * 4)


# LePE -------------------------------------------------------------------------------------------------------


def _lepe_forward(grid: Sequence[int], a: Arguments) -> Work:
    images, dim, size = a["value"].shape[0], a["DIM"], a["value"].element_size()
    sides, padded, kernel = (a["height"], a["width"]), (a["padded_height"], a["padded_width"]), a["KERNEL"]
    tokens = images * sides[0] * sides[1]
    parameters = (kernel**2 + (1 if a["HAS_BIAS"] else 0)) * dim * size
    # Taps that lie in the padding take what it holds instead.
    taps = images * _taps(sides, padded if a["HAS_FILL"] else sides, kernel)
    moved = 3 * tokens * dim * size + parameters + (dim * size if padded != sides else 0)
    return Work((kernel**2,), moved, (taps + 2 * tokens) * dim * size + grid[0] * parameters)


def _lepe_backward(grid: Sequence[int], a: Arguments) -> Work:
    images, dim, size = a["value"].shape[0], a["DIM"], a["value"].element_size()
    sides, reach, kernel = (a["height"], a["width"]), (a["reach_height"], a["reach_width"]), a["KERNEL"]
    tokens = images * sides[0] * sides[1]
    taps = images * _taps(reach, sides, kernel)
    fill = dim * size if a["HAS_FILL"] and a["NEEDS_WEIGHT_GRAD"] else 0
    # The values' gradient is read and written; values and the output's gradient only for the weight's.
    own = (4 if a["NEEDS_WEIGHT_GRAD"] else 2) * tokens
    partials, weights = grid[0] * a["ROWS"] * dim * 4, kernel**2 * dim * size
    moved = (own if a["NEEDS_WEIGHT_GRAD"] else own + tokens) * dim * size + weights + fill + partials
    return Work((kernel**2,), moved, (taps + own) * dim * size + grid[0] * (weights + fill) + partials)


def _taps(own: tuple[int, int], other: tuple[int, int], kernel: int) -> int:
    """Pairs of a token of one map and a tap of its convolution that lies in another, which starts with it."""

    def along(axis: int) -> int:
        half = kernel // 2
        steps = range(-half, half + 1)
        return sum(max(0, min(own[axis], other[axis] - step) - max(0, -step)) for step in steps)

    return along(0) * along(1)


# Pooling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pooling:
    """Sizes that the pooling kernels share; a cell is `cell_height` x `cell_width` tokens."""

    images: int
    tokens: int
    cell_height: int
    cell_width: int
    cells: int
    row: int
    channels: int

    @classmethod
    def of(cls, a: Arguments, images: int, element_size: int) -> "_Pooling":
        cells = a["rows"] * a["cells_high"] * a["columns"] * a["cells_wide"]
        return cls(
            images,
            a["height"] * a["width"],
            cdiv(a["region_height"], a["cells_high"]),
            cdiv(a["region_width"], a["cells_wide"]),
            cells,
            a["CHANNELS"] * element_size,
            a["CHANNELS"],
        )

    def table(self, a: Arguments) -> int:
        """Bytes of the two tables of cells; the same one may serve both axes."""
        shared = a["row_cells"] is a["column_cells"]
        return 8 * (a["cells_high"] + (0 if shared else a["cells_wide"]))


def _pool(grid: Sequence[int], a: Arguments) -> Work:
    p = _Pooling.of(a, a["x"].shape[0], a["x"].element_size())
    turns = p.cell_height * p.cell_width
    cells = p.images * p.cells
    written = cells * (p.row + (4 * p.channels if a["MODE"] == "max" else 0))
    values = p.images * p.tokens * p.row
    weights = (turns + 1) * 4 * p.channels if a["MODE"] == "weighted" else 0
    fill = p.row if a["PADDED"] else 0
    requested = values + grid[0] * (turns * fill + weights) + cells * grid[1] * 4 * 4 + written
    return Work((p.cell_height, turns), values + fill + weights + p.table(a) + written, requested)


def _pool_backward(grid: Sequence[int], a: Arguments) -> Work:
    p = _Pooling.of(a, a["grad_x"].shape[0], a["grad_x"].element_size())
    tokens = p.images * a["rows"] * a["region_height"] * a["columns"] * a["region_width"]
    written = p.images * p.tokens * p.row + (grid[0] * p.channels * 4 if a["PADDED"] else 0)
    extra = {"max": 4 * p.channels, "mean": 0, "weighted": 4 * p.channels}[a["MODE"]]
    weights = p.cell_height * p.cell_width * 4 * p.channels if a["MODE"] == "weighted" else 0
    pooled = p.images * p.cells * (p.row + (extra if a["MODE"] == "max" else 0))
    same_axes = a["row_holders"] is a["column_holders"]
    holders = 8 * (a["region_height"] + (0 if same_axes else a["region_width"]))
    # For every token who holds it, along both axes, and where those cells start and end.
    requested = tokens * (grid[1] * 4 * 8 + p.row + extra) + written
    turns = (a["strip_tiles"],) * 3
    return Work(turns, pooled + weights + p.table(a) + holders + written, requested)


def _weight_gradient(grid: Sequence[int], a: Arguments) -> Work:
    p = _Pooling.of(a, a["x"].shape[0], a["x"].element_size())
    strips, blocks, taps = grid
    cells = p.images * p.cells
    fill = p.row if a["PADDED"] else 0
    written = strips * taps * p.channels * 4
    # The maps' tokens lie under one tap each.
    values = p.images * p.tokens * p.row
    requested = taps * (cells * (blocks * 4 * 4 + p.row) + a["tiles"] * fill) + values + written
    return Work((a["strip_tiles"],), values + cells * p.row + p.table(a) + fill + written, requested)


def _invert_cells(grid: Sequence[int], a: Arguments) -> Work:
    written = 8 * a["side"]
    turns = cdiv(a["count"], a["BLOCK_CELLS"])
    return Work((turns,), 8 * a["count"] + written, grid[0] * 8 * a["count"] + written)


WORK: dict[str, Callable[[Sequence[int], Arguments], Work]] = {
    "region_means": _region_means,
    "route": _route,
    "sum_over_pairs": _sum_over_pairs,
    "list_tokens": _list_tokens,
    "mark_choices": _mark_choices,
    "invert_graph": _invert_graph,
    "cut_rows": _cut_rows,
    "sum_pieces": _sum_pieces,
    "lepe_forward": _lepe_forward,
    "lepe_backward": _lepe_backward,
    "pool": _pool,
    "invert_cells": _invert_cells,
    "pool_backward": _pool_backward,
    "weight_gradient": _weight_gradient,
}
