"""Problems for all forms of the Triton backend, and a log of the launches that a stand-in driver receives."""

import threading
from dataclasses import replace

import torch
from torch import Tensor

from bra_triton.kernels import calls
from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.pooling.problem import WEIGHTED, RegionPooling
from bra_triton.kernels.problem import Needs, PackedAttention, Padding, RoutedAttention, Settings

HALF = torch.float16
HEAD = 9  # arguments that Triton's launcher takes before those of the kernel


class Log(threading.local):
    """The launches of this thread since the last `take`: pairs of launcher and arguments."""

    def __init__(self):
        self.launches = []

    def take(self):
        taken, self.launches = self.launches, []
        return taken


def settings(height, width, n_win, topk, **others):
    return Settings(32, 1, RegionGrid.of_windows(height, width, n_win), topk, 0.25, 0.25, **others)


def attention(settings, dtype=HALF, lepe=3, pooled=None, router=False):
    """A random packed problem.

    With a `qk_dim` of 20, half-precision keys start at byte 40 of a packed row, no multiple of 16.
    """
    grid, dim = settings.grid, 32
    packed_dim = 2 * settings.qk_dim + dim

    def random(*shape, dtype=dtype):
        return torch.randn(shape).to(dtype)

    return PackedAttention(
        random(2, grid.height, grid.width, packed_dim),
        None
        if pooled is None
        else random(2, grid.rows * pooled, grid.columns * pooled, packed_dim - settings.qk_dim),
        random(packed_dim) if grid.is_padded else None,
        random(2, grid.n_regions, 2 * settings.qk_dim, dtype=torch.float32) if router else None,
        random(dim, 1, lepe, lepe) if lepe else None,
        random(dim) if lepe else None,
        settings,
    )


def regional(n_graphs=2):
    """A problem with given regions; its heads of 20 channels are slices of packed maps."""
    grid, kv_grid = RegionGrid.of_region_size(7, 9, (3, 4)), RegionGrid.of_region_size(5, 6, (2, 2))
    query = torch.randn(1, 7, 9, 80).to(HALF)[..., 24:64]
    key, value = torch.randn(1, 5, 6, 80).to(HALF).split(40, dim=-1)
    r_idx = torch.zeros(1, n_graphs, grid.n_regions, 2, dtype=torch.int32)
    padding = Padding(torch.zeros(40, dtype=HALF), torch.zeros(40, dtype=HALF))
    return RoutedAttention(query, key, value, r_idx, grid, kv_grid, 2, 0.25, padding=padding)


def step(problem):
    """Launches all kernels of a forward and a backward."""
    if isinstance(problem, RoutedAttention):
        out, lse = calls.attend_routed(problem)
        calls.attend_routed_backward(torch.empty_like(out), problem, out, lse)
    elif isinstance(problem, RegionPooling):
        pool(problem)
    else:
        needs = Needs(*(x is not None for x in problem.tensors))
        out, saved = calls.attend(problem, trains=True)
        calls.attend_backward(torch.empty_like(out), problem, out, saved, needs)


def pool(pooling):
    grid = pooling.grid
    packed, fill = torch.randn(2, grid.height, grid.width, 96).to(HALF), torch.zeros(64, dtype=HALF)
    x, weight, bias = packed[..., 32:], torch.zeros(64, 2, 2), torch.zeros(64)
    pooled, argmax = calls.pool(x, fill, pooling, weight, bias)
    calls.pool_backward(pooled, x, fill, argmax, pooling, weight, torch.empty_like(packed)[..., 32:])


_CELLS = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32)
PLAIN = settings(48, 72, 4, 3)  # regions too large for a small map's kernels
SMALL = settings(16, 16, 4, 3)
FORMS = {
    "plain": lambda: attention(PLAIN),
    "float32": lambda: attention(PLAIN, torch.float32),
    "without LePE": lambda: attention(PLAIN, lepe=0),
    "padded": lambda: attention(settings(47, 70, 4, 3)),
    "soft": lambda: attention(replace(PLAIN, routing_weight="soft", diff_routing=True)),
    "padded hard": lambda: attention(
        settings(47, 70, 4, 3, routing_weight="hard", diff_routing=True), lepe=5
    ),
    "router": lambda: attention(replace(PLAIN, routing_weight="hard", diff_routing=True), router=True),
    "narrow queries": lambda: attention(replace(PLAIN, qk_dim=20)),
    "masked": lambda: attention(settings(14, 14, 7, 16)),
    "masked, padded": lambda: attention(settings(13, 14, 7, 16)),
    "whole": lambda: attention(settings(8, 12, 4, 16)),
    "whole, padded": lambda: attention(settings(7, 10, 4, 16)),
    "pooled": lambda: attention(PLAIN, pooled=1),
    "small map": lambda: attention(SMALL),
    "small map, soft, padded": lambda: attention(settings(7, 10, 4, 3, routing_weight="soft")),
    "nchw": regional,
    "pooling": lambda: RegionPooling(_CELLS, _CELLS, WEIGHTED, RegionGrid.of_windows(5, 6, 2)),
}


def seen(log):
    """Takes the log; returns compiled kernel, grid, stream and numbers of every launch, without addresses."""
    launches = []
    for run, args in log.take():
        groups = [x for x in args[HEAD:] if hasattr(x, "_fields") and not holds_pointers(x)]
        numbers = [*groups, *(x for x in args[HEAD:] if isinstance(x, float))]
        sizes = [x for x in args[HEAD:] if isinstance(x, int) and x < 2**20]  # addresses are larger
        launches.append((id(run), args[:4], numbers, sizes))
    return launches


def launched(log, problem):
    step(problem)
    return seen(log)


def holds_pointers(value):
    """Whether a named tuple is a group of pointers (or only None); direct launches pass plain tuples."""
    return holds_tensors(value) or not any(member is not None for member in value)


def holds_tensors(value):
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(holds_tensors, value)))
