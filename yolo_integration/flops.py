"""Counts the attention's multiply-adds for Ultralytics' model summary."""

import contextlib
from typing import Any

from torch import Tensor

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.kernels.grid import RegionGrid


def register_rule() -> None:
    """Tells thop, the profiler behind `model.info()`, how to count the attentions, if thop is installed."""
    with contextlib.suppress(ImportError):
        from thop.profile import register_hooks

        register_hooks[BiLevelRoutingAttention] = count_attention
        register_hooks[NCHWBiLevelRoutingAttention] = count_nchw_attention


def count_attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Adds routing, attention and LePE to `module.total_ops`; the profiler counts the projections by itself.

    Args:
        module: the attention.
        inputs: its input, `(N, H, W, dim)`.
        output: its output, of the same shape.

    Raises:
        ValueError: if a side of the map is shorter than `n_win`. The profiler first counts an image of 32
            pixels and extrapolates from it, which would be wrong here, as the map would be padded to `n_win`.
            After this error it counts an image of the real size.
    """
    batch, height, width, _ = inputs[0].shape
    _refuse_small_map(height, width, module.spec.n_win)
    grid = RegionGrid.of_windows(height, width, module.spec.n_win)
    module.total_ops += batch * _products(grid, module)


def count_nchw_attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Like `count_attention`, for the NCHW form.

    Args:
        module: the attention.
        inputs: its input, `(N, dim, H, W)`.
        output: its output, of the same shape.

    Raises:
        ValueError: as `count_attention`.
    """
    batch, _, height, width = inputs[0].shape
    _refuse_small_map(height, width, module.spec.n_win)
    module.total_ops += batch * _products(module.grid(inputs[0]), module)


def _refuse_small_map(height: int, width: int, n_win: int) -> None:
    if min(height, width) < n_win:
        raise ValueError(f"no count for a map of {height} x {width}, smaller than n_win={n_win} a side")


def _products(grid: RegionGrid, module: Any) -> int:
    """Multiply-adds of routing, attention and LePE for one image, padding included."""
    spec, tokens = module.spec, grid.n_regions * grid.region_tokens
    routing = grid.n_regions**2 * spec.qk_dim
    attention = tokens * spec.topk * grid.region_tokens * (spec.qk_dim + spec.dim)
    lepe = 0 if module.lepe is None else tokens * module.lepe.weight.numel()
    return routing + attention + lepe
