"""Records what the attention layers of a model attend to in one image.

A hook on every layer takes the layer's input and lets the reference compute its attention again, because the
kernels never hold an attention matrix that could be read. The layers' forward is not changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import reference
from ..call import Call, in_dtype_of
from ..kernels.grid import RegionGrid
from ..modules.base import Attention


@dataclass(frozen=True)
class LayerAttention:
    """What one layer attended to in one image; tensors are on the CPU.

    Attributes:
        name: the layer's name in the model.
        grid: regions of the layer's map.
        kv_grid: the same regions on the map of keys and values, which down-sampling makes smaller.
        r_idx: `(P, topk)` int64: the regions that each region was routed to, the largest logit first.
        r_weight: `(P, topk)` float32: the routing weights, which sum to 1.
        weights: `(num_heads, P, S, topk*S_kv)` float32: the weight of each key's value in the output of each
            query. They sum to 1 over the keys, except with soft routing, which multiplies them by the routing
            weights.
    """

    name: str
    grid: RegionGrid
    kv_grid: RegionGrid
    r_idx: Tensor
    r_weight: Tensor
    weights: Tensor

    @classmethod
    def of(cls, name: str, call: Call) -> "LayerAttention":
        """The attention of a call whose batch is one image."""
        scored, grid = reference.attend(call), call.grid
        r_idx, r_weight, weights = scored.r_idx[0], scored.r_weight[0].float(), scored.attn_weight.float()
        if call.spec.soft_routing:
            by_region = rearrange(weights, "r m s (t k) -> r m s t k", t=r_idx.shape[1])
            weights = (by_region * rearrange(r_weight, "r t -> r 1 1 t 1")).flatten(3)
        sides = torch.Size((grid.region_height, grid.region_width))
        if call.kv_downsampling is not None:  # any layer, if another was put in the place of ours
            key_value = call.qkv.new_zeros(1, call.spec.qk_dim + call.spec.dim, *sides)
            sides = in_dtype_of(call.kv_downsampling, key_value).shape[-2:]
        return cls(
            name,
            grid,
            grid.pooled(*sides),
            r_idx.cpu(),
            r_weight.cpu(),
            rearrange(weights, "r m s k -> m r s k").cpu(),
        )

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.weights.shape[0]

    @property
    def topk(self) -> int:
        """Regions that every region attends to."""
        return self.r_idx.shape[1]

    def locate(self, x: float, y: float) -> tuple[int, int]:
        """Region, and token in it, at a place given as fractions of the map's width and height."""
        grid = self.grid
        column = min(max(int(x * grid.width), 0), grid.width - 1)
        row = min(max(int(y * grid.height), 0), grid.height - 1)
        region = row // grid.region_height * grid.columns + column // grid.region_width
        return region, row % grid.region_height * grid.region_width + column % grid.region_width

    def heat(self, region: int, token: int) -> Tensor:
        """A query's weights on the map of keys, padding included; NaN in regions that were not chosen.

        Returns:
            `(num_heads, H_kv, W_kv)` float32.
        """
        high, wide = self.kv_grid.region_height, self.kv_grid.region_width
        heat = self.weights.new_full((self.num_heads, self.kv_grid.n_regions, high, wide), torch.nan)
        heat[:, self.r_idx[region]] = self.weights[:, region, token].unflatten(-1, (self.topk, high, wide))
        return rearrange(heat, "m (j i) h w -> m (j h) (i w)", j=self.kv_grid.rows)


@dataclass(frozen=True)
class Recording:
    """A model's result for one image, and the attention of its layers.

    Attributes:
        result: what the model returned.
        image: `(C, H, W)` float32 on the CPU: the network's input, after any preprocessing.
        layers: the model's attention layers, in the order in which they ran.
    """

    result: Any
    image: Tensor
    layers: list[LayerAttention]


def record(
    model: nn.Module, image: Any, layers: Sequence[str | int] | None = None, **settings: Any
) -> Recording:
    """Calls `model(image, **settings)` in evaluation mode and records its attention layers.

    Args:
        model: any module that holds a `BiLevelRoutingAttention` or an `nchwBRA`, or a `YOLO` of Ultralytics.
        image: one image, as the model takes it. A tensor may lack the batch axis. A `YOLO` also takes a file
            name, a PIL image or a NumPy array, and letterboxes it.
        layers: the layers to record, by position or name, see `choose`; all by default.
        settings: further arguments of the call, such as `imgsz=640` of a `YOLO`.

    Returns:
        The recording. If a layer runs several times, its last run is recorded.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Example:
        >>> from bra_triton import BiLevelRoutingAttention
        >>> model = BiLevelRoutingAttention(64, n_win=8)
        >>> record(model, torch.randn(1, 16, 16, 64)).layers[0].r_idx.shape
        torch.Size([64, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or a YOLO of Ultralytics, got {model!r}")
    network = _network(model)
    attentions = {name: m for name, m in network.named_modules() if isinstance(m, Attention)}
    if not attentions:
        raise ValueError(
            "model must hold a BiLevelRoutingAttention or NCHWBiLevelRoutingAttention, got a "
            f"{type(network).__name__} without one; bra_triton.replace_attention replaces other "
            "implementations by them"
        )
    chosen = choose([*attentions], layers)
    if network is model and not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor for a model that is not a YOLO, got {type(image).__name__}")
    if isinstance(image, Tensor) and image.dim() == 3:
        image = image[None]

    inputs: list[Tensor] = []
    seen: dict[str, LayerAttention] = {}

    # The hooks are plain functions, because a YOLO predicts with a deep copy of its network: deepcopy keeps
    # functions as they are, so the copy's hooks write to `inputs` and `seen`, too.
    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [_first(args, kwargs)]  # only the last call counts: a YOLO may warm up first
        seen.clear()

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.pop(name, None)
            seen[name] = LayerAttention.of(name, layer.call_of(_first(args, kwargs)))

        return hook

    with torch.no_grad(), _evaluating(network), _without_predictor(model):
        hooks = [network.register_forward_pre_hook(start, with_kwargs=True, prepend=True)]
        hooks += [attentions[name].register_forward_pre_hook(look(name), with_kwargs=True) for name in chosen]
        try:
            result = model(image, **settings)
        finally:
            for handle in hooks:
                handle.remove()
    _check_one_image(result if network is not model else [result], inputs)
    if not seen:
        raise ValueError(f"layers must include one that runs for this image, got {chosen}")
    return Recording(result, inputs[0][0].float().cpu(), [*seen.values()])


def choose(names: Sequence[str], layers: Sequence[str | int] | None) -> list[str]:
    """The names of the chosen layers, in the model's order.

    Args:
        names: the names of all layers.
        layers: positions in `names`, from 0, as ints or as strings of digits; names; or beginnings of names,
            up to a dot: `"model.10"` chooses every layer in it. None chooses all.

    Raises:
        TypeError: if `layers` is a single entry: the characters of a name would be taken for entries.
        ValueError: if an entry of `layers` fits no name; lists the names.
    """
    if layers is None:
        return [*names]
    if isinstance(layers, str | int):
        raise TypeError(f"layers must be a list of positions and names, got {layers!r}")
    chosen = set()
    for layer in layers:
        if str(layer).isdecimal() and int(layer) < len(names):
            found = {names[int(layer)]}
        else:
            found = {name for name in names if f"{name}.".startswith(f"{layer}.")}
        if not found:
            listed = "".join(f"\n  {index}: {name}" for index, name in enumerate(names))
            raise ValueError(f"layers must name some of these, by position or name, got {layer!r}:{listed}")
        chosen |= found
    return [name for name in names if name in chosen]


def _network(model: nn.Module) -> nn.Module:
    """The module whose input is the image; a `YOLO` of Ultralytics is a wrapper around it."""
    return cast(nn.Module, model.model) if _is_yolo(model) else model


def _is_yolo(model: nn.Module) -> bool:
    """Whether a model is a `YOLO`: another model may have a layer that is called `predictor`."""
    return hasattr(model, "predictor") and "predictor" not in model._modules


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Context in which a network is in evaluation mode; afterwards each module has its former mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _without_predictor(model: Any) -> Iterator[None]:
    """Context in which a `YOLO` predicts with a new copy of its network: an earlier copy has no hooks."""
    if _is_yolo(model):
        predictor, model.predictor = model.predictor, None
        try:
            yield
        finally:
            model.predictor = predictor
    else:
        yield


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def _check_one_image(results: Any, inputs: list[Tensor]) -> None:
    if not inputs:
        raise ValueError("stream must be False, so that the model runs now, got stream=True")
    count = max(len(results), len(inputs[0]))
    if count != 1:
        raise ValueError(f"image must be one image, got {count}")
