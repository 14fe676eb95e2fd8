"""One object for each call: its tensors, the specification of what is computed, and the regions.

The checks of a call are here; `regional_call` has those of an attention along a given graph. If a call with
the same signature (shapes, dtypes, numbers) has passed them before, they are not repeated: `functional` keeps
the signatures that have passed.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import dense_floats
from .autocast import without_autocast
from .export import is_eager
from .kernels.grid import RegionGrid
from .kernels.problem import Settings
from .modules.downsampling import KVDownsampling
from .spec import AttentionSpec


class Request(Protocol):
    """The properties that the choice of a backend depends on; `Call` and `RegionalCall` have them."""

    @property
    def like(self) -> Tensor:
        """A tensor with the device and dtype of the call."""

    @property
    def head_dims(self) -> tuple[int, int]:
        """Channels of a query or key, and of a value, in one head."""

    @property
    def grids(self) -> tuple[RegionGrid, ...]:
        """The regions of each map."""

    @property
    def routes(self) -> bool:
        """Whether the call chooses regions; False if they are given."""

    @property
    def calls(self) -> str:
        """The names of layers that only the reference can call, for messages; empty if there are none."""


@dataclass(slots=True)
class Known:
    """Results that all calls with the same signature share.

    Attributes:
        settings: the numbers of the calls.
        backend: the backend that serves the calls; None if it is not chosen yet.
        plans: where the backend keeps its plans for the calls; None if nothing is kept for their signature,
            as in a graph that a compiler records.
    """

    settings: Settings
    backend: Any = None
    plans: dict[Hashable, Any] | None = None


@dataclass(slots=True)
class Call:
    """Bi-level routing attention of a packed projection; backends receive this object.

    Attributes:
        qkv: `(N, H, W, 2*qk_dim + dim)`, of any strides.
        spec: what is computed.
        lepe_weight: `(dim, 1, k, k)`, `k` odd: depthwise convolution of the values added to the output.
        lepe_bias: `(dim,)`; only with `lepe_weight`.
        padding: `(2*qk_dim + dim,)`: what tokens past the map's edge hold; None if there are no such tokens.
        router_weight: `(qk_dim, qk_dim)`: linear layer on region queries and keys; needs `diff_routing`.
        router_bias: `(qk_dim,)`; only with `router_weight`.
        kv_downsampling: reduces keys and values inside each region.
        given_grid: the regions, if they are not `n_win` regions a side.
        router_layer: module to call instead of a linear layer on region queries and keys.
        router: function to call instead of the whole routing, with region queries and keys `(N, P, qk_dim)`;
            returns the same as `Backend.route`.
        calls: names of the layers that only the reference can call, "router" and "kv_down"; empty if there
            are none.
        eager: whether no graph is being recorded, see `export.is_eager`.
        known: results that this call shares with others of the same signature; None if not looked up yet.
    """

    qkv: Tensor
    spec: AttentionSpec
    lepe_weight: Tensor | None = None
    lepe_bias: Tensor | None = None
    padding: Tensor | None = None
    router_weight: Tensor | None = None
    router_bias: Tensor | None = None
    kv_downsampling: KVDownsampling | None = None
    given_grid: RegionGrid | None = None
    router_layer: nn.Module | None = None
    router: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    calls: str = ""
    eager: bool = field(default_factory=is_eager)
    known: Known | None = None
    routes: ClassVar[bool] = True  # see `Request`

    @property
    def settings(self) -> Settings:
        """The specification's numbers for a map of this size."""
        if self.known is None:
            _, height, width, _ = self.qkv.shape
            grid = self.given_grid or RegionGrid.of_windows(height, width, self.spec.n_win)
            self.known = Known(self.spec.settings(grid))
        return self.known.settings

    @property
    def grid(self) -> RegionGrid:
        """Regions of the map."""
        return self.settings.grid

    @property
    def like(self) -> Tensor:
        """See `Request`."""
        return self.qkv

    @property
    def head_dims(self) -> tuple[int, int]:
        """See `Request`."""
        return self.spec.head_dims

    @property
    def grids(self) -> tuple[RegionGrid, ...]:
        """See `Request`."""
        return (self.grid,)

    @property
    def signature(self) -> tuple[Any, ...]:
        """Everything that the checks and the choice of a backend depend on."""
        qkv, down = self.qkv, self.kv_downsampling
        return (
            self.spec,
            _kind(qkv),
            None if self.lepe_weight is None else _kind(self.lepe_weight),
            None if self.lepe_bias is None else _kind(self.lepe_bias),
            None if self.padding is None else _kind(self.padding),
            None if self.router_weight is None else _kind(self.router_weight),
            None if self.router_bias is None else _kind(self.router_bias),
            None if down is None or self._is_foreign(down) else (down.qk_dim, down.dim),
            self.given_grid,
            self.calls,
        )

    def _is_foreign(self, down: nn.Module) -> bool:
        """Whether somebody else's layer, which has no numbers to check, is to be called for down-sampling."""
        return bool(self.calls) and not isinstance(down, KVDownsampling)

    @property
    def has_router_layer(self) -> bool:
        """Whether the router applies a layer to region queries and keys."""
        return self.router_weight is not None or self.router_layer is not None

    def emb(self, means: Tensor) -> Tensor:
        """Applies the router's layer to region queries or keys `(..., qk_dim)`; keeps their dtype.

        Raises:
            ValueError: if the layer returns another shape.
        """
        if self.router_layer is not None:
            out: Tensor = in_dtype_of(self.router_layer, means).to(means.dtype)
            if out.shape != means.shape:
                raise ValueError(f"router.emb must return {tuple(means.shape)}, got {tuple(out.shape)}")
            return out
        if self.router_weight is None:
            return means
        bias = None if self.router_bias is None else self.router_bias.to(means.dtype)
        with without_autocast(means):
            return F.linear(means, self.router_weight.to(means.dtype), bias)

    def check(self) -> None:
        """Raises ValueError or TypeError if the tensors do not fit each other; names the argument."""
        qkv, spec = dense_floats("qkv", self.qkv), self.spec
        for name in ("lepe_weight", "lepe_bias", "padding", "router_weight", "router_bias"):
            _check_kind(name, getattr(self, name), qkv.device)
        if self.given_grid is None:
            # Raises ValueError if the map must be padded and there is no padding.
            RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win, auto_pad=self.padding is not None)
        if qkv.shape[-1] != spec.packed_dim:
            raise ValueError(
                f"qkv must have 2*qk_dim + dim = {spec.packed_dim} channels, got {qkv.shape[-1]}"
            )
        _check_shape("padding", self.padding, (spec.packed_dim,))
        # Modules pass the parameters of their router's layer under these names.
        _check_shape("router_weight (router.emb.weight)", self.router_weight, (spec.qk_dim, spec.qk_dim))
        _check_shape("router_bias (router.emb.bias)", self.router_bias, (spec.qk_dim,))
        _check_lepe(self.lepe_weight, self.lepe_bias, spec.dim)
        if self.router_weight is not None and not spec.diff_routing:
            raise ValueError("router_weight needs diff_routing=True, or it gets no gradient")
        if self.router_weight is None and self.router_bias is not None:
            raise ValueError("router_bias needs router_weight, got router_weight=None")
        down = self.kv_downsampling
        if down is None or self._is_foreign(down):
            return
        if not isinstance(down, KVDownsampling):
            raise TypeError(f"kv_downsampling must be a module made by downsampling.build, got {down!r}")
        if (down.qk_dim, down.dim) != (spec.qk_dim, spec.dim):
            raise ValueError(
                f"kv_downsampling must be for qk_dim={spec.qk_dim} and dim={spec.dim}, got {down.qk_dim} and "
                f"{down.dim}"
            )


def in_dtype_of(layer: nn.Module, *tensors: Tensor) -> Any:
    """Calls a layer with tensors cast to its parameters' dtype, which may be less precise than theirs."""
    # PyTorch 2.8 cannot compile `next` with a default.
    dtypes = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    return layer(*(x.to(dtypes[0]) if dtypes else x for x in tensors))


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.layout


def _check_kind(name: str, x: Tensor | None, device: torch.device) -> None:
    if x is not None and dense_floats(name, x).device != device:
        raise ValueError(f"{name} must be on qkv's device, {device}, got {x.device}")


def _check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")


def _check_lepe(weight: Tensor | None, bias: Tensor | None, dim: int) -> None:
    if weight is None:
        if bias is not None:
            raise ValueError("lepe_bias needs lepe_weight, got lepe_weight=None")
        return
    kernel = weight.shape[-1] if weight.dim() else 0
    if weight.shape != (dim, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f"lepe_weight must be ({dim}, 1, k, k) with k odd, got {tuple(weight.shape)}")
    _check_shape("lepe_bias", bias, (dim,))
