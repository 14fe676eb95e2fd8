"""The attention's multiply-adds for Ultralytics' model summary."""

import contextlib
from typing import Any

from torch import Tensor

from bra_triton import BiLevelRoutingAttention


def register_rule() -> None:
    """Adds `count_attention` to the profiler behind `model.info()`, where that is installed."""
    with contextlib.suppress(ImportError):
        from thop.profile import register_hooks

        register_hooks[BiLevelRoutingAttention] = count_attention


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
    spec = module.spec
    if min(height, width) < spec.n_win:
        raise ValueError(f"no count for a map of {height} x {width}, smaller than n_win={spec.n_win} a side")
    regions = spec.n_win**2
    tokens = (-(-height // spec.n_win)) * (-(-width // spec.n_win))
    routing = regions * regions * spec.qk_dim
    attention = regions * tokens * (spec.topk * tokens) * (spec.qk_dim + spec.dim)
    lepe = 0 if module.lepe is None else regions * tokens * module.lepe.weight.numel()
    module.total_ops += batch * (routing + attention + lepe)
