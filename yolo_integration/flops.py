"""Counts the attention's multiply-adds for Ultralytics' model summary."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils.torch_utils import unwrap_model

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
from bra_triton.modules.downsampling import KVDownsampling
from bra_triton.modules.nhwc import QKVLinear

from .modules import has_attention


def register_rule() -> None:
    """Tells thop, the profiler behind `model.info()`, how to count the attentions, if thop is installed."""
    with contextlib.suppress(ImportError):
        from thop.profile import register_hooks

        register_hooks[BiLevelRoutingAttention] = _count_profiled
        register_hooks[NCHWBiLevelRoutingAttention] = count_attention


def count_attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Adds routing and attention to `module.total_ops`; the profiler counts the layers by itself."""
    spec, grid, kv_down = module.spec, module.grid(inputs[0]), module._modules.get("kv_down")
    keys = kv_down.kv_grid(grid) if isinstance(kv_down, KVDownsampling) else grid
    settings = spec.settings(grid)
    routing = settings.region_logits * spec.qk_dim
    attention = settings.token_scores(keys.region_tokens) * (spec.qk_dim + spec.dim)
    module.total_ops += len(inputs[0]) * (routing + attention)


def _count_profiled(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """As `count_attention`, less the projection of padding, which only the profiler's hooks cause."""
    count_attention(module, inputs, output)
    if type(module.qkv) is QKVLinear:
        grid, spec = module.grid(inputs[0]), module.spec
        padding = grid.n_regions * grid.region_tokens - grid.height * grid.width
        module.total_ops -= len(inputs[0]) * padding * spec.dim * spec.packed_dim


def at_real_size(original: Callable[..., float], model: nn.Module, imgsz: Any = 640) -> float:
    """Does the work of Ultralytics' `get_flops`, on an image of the full size.

    Ultralytics counts on small images, 32 pixels high, and extrapolates. That is wrong for the attention: its
    work is not proportional to the image's size, and on small maps most of it is padding.

    Args:
        original: Ultralytics' function, for models without these attentions.
        model: the model.
        imgsz: height and width of the image, or one number for both.

    Returns:
        GFLOPs; 0.0, as Ultralytics' function, if the model does not take an image of this size.
    """
    if not has_attention(model):
        return original(model, imgsz)
    try:
        import thop
    except ImportError:
        return original(model, imgsz)
    model = unwrap_model(model)  # hooks would change a compiled graph, and so what is counted
    parameter = next(model.parameters())
    size = imgsz if isinstance(imgsz, list | tuple) else (imgsz, imgsz)
    image = torch.empty((1, parameter.shape[1], *size), device=parameter.device, dtype=parameter.dtype)
    try:
        multiply_adds: float = thop.profile(model, inputs=[image], verbose=False)[0]
    except (RuntimeError, ValueError):
        return 0.0
    return multiply_adds / 1e9 * 2
