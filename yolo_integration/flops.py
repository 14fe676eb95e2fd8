"""The attention's multiply-adds for Ultralytics' model summary."""

import contextlib
from typing import Any

from torch import Tensor

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.kernels.grid import RegionGrid


def register_rule() -> None:
    """Adds the attentions' counts to the profiler behind `model.info()`, where that is installed."""
    with contextlib.suppress(ImportError):
        from thop.profile import register_hooks

        register_hooks[BiLevelRoutingAttention] = count_attention
        register_hooks[NCHWBiLevelRoutingAttention] = count_nchw_attention


def count_attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Adds routing, attention and LePE to `module.total_ops`; the projections count themselves.

    Args:
        module: the attention.
        inputs: its input, `(N, H, W, dim)`.
        output: its output, of the same shape.

    Raises:
        ValueError: if a side of the map is shorter than `n_win`. The profiler tries images of 32 pixels and
            extrapolates, which padding to `n_win` would falsify; after an error it takes the real size.
    """
    batch, height, width, _ = inputs[0].shape
    _refuse_small_map(height, width, module.spec.n_win)
    grid = RegionGrid.of_windows(height, width, module.spec.n_win)
    module.total_ops += batch * _products(grid, module)


def count_nchw_attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """`count_attention` for the NCHW form.

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
    """Multiply-adds of routing, attention and LePE in an image, padding included."""
    spec, tokens = module.spec, grid.n_regions * grid.region_tokens
    routing = grid.n_regions**2 * spec.qk_dim
    attention = tokens * spec.topk * grid.region_tokens * (spec.qk_dim + spec.dim)
    lepe = 0 if module.lepe is None else tokens * module.lepe.weight.numel()
    return routing + attention + lepe
