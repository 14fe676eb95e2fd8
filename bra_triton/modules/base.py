"""The base classes of the drop-in modules: their attributes, and which of these can be set.

"The original" is the authors' module, in rayleizhu/BiFormer, that a drop-in module replaces.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import factor, flag
from ..backend.select import check_name
from ..call import Call
from ..checkpoint_keys import TakesNames
from ..reference import padded
from ..spec import AttentionSpec
from .inputs import apply

FIXED_BY_PARAMETERS = "it determines the parameters' shapes; pass it to the constructor"
NEVER_CALLED = "no backend calls it, so it would have no effect"
# Attributes that must hold a module. Only `lepe` can also be None: no LePE, for which the original stores a
# function.
_LAYERS = ("lepe", "qkv", "wo", "router", "emb", "kv_down", "qkv_linear", "output_linear")


def number(name: str) -> property:
    """A property that reads a number of `spec`; setting it makes a new spec, which checks the number."""

    def read(module: "Specified") -> Any:
        return getattr(module.spec, name)

    def write(module: "Specified", value: Any) -> None:
        module.spec = replace(module.spec, **{name: value})

    return property(read, write, doc=f"See `AttentionSpec.{name}`.")


class Specified(nn.Module):
    """A module with a specification.

    Setting an attribute that `_fixed` names raises AttributeError; setting a layer to anything but a module
    raises TypeError.

    Attributes:
        spec: the numbers that define the attention.
    """

    spec: AttentionSpec
    # Attributes that cannot be set, each with the reason: names of the original's attributes and of arguments
    # of which a new value would be ignored.
    _fixed: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed:
            raise AttributeError(f"{name} cannot be set, got {value!r}: {self._fixed[name]}")
        if name in _LAYERS and not isinstance(value, nn.Module) and not (name == "lepe" and value is None):
            raise TypeError(f"{name} must be an nn.Module, got {value!r}")
        if isinstance(getattr(type(self), name, None), property):
            # nn.Module would register a parameter or a module under this name and not call the setter.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Attention(Specified, TakesNames):
    """The base of the drop-in modules.

    `n_win`, `num_heads`, `topk`, `scale`, `soft_routing`, `diff_routing`, `auto_pad` and `backend` can be set
    at any time; a new value is checked as in the constructor. Attributes that determine the shapes of the
    parameters can only be read: setting one raises AttributeError.
    """

    _fixed: ClassVar[dict[str, str]] = {
        "dim": FIXED_BY_PARAMETERS,
        "attn_act": NEVER_CALLED,
        "qk_scale": "set scale, which holds this setting",
        "side_dwconv": "lepe holds this setting; replace lepe by another depthwise convolution, or None",
    }

    dim = number("dim")
    n_win = number("n_win")
    num_heads = number("num_heads")
    topk = number("topk")
    soft_routing = number("soft_routing")
    diff_routing = number("diff_routing")

    @property
    def scale(self) -> float:
        """Factor of the tokens' logits. As in the original, setting it does not change the router's."""
        return self.spec.scale

    @scale.setter
    def scale(self, value: float) -> None:
        scale = factor("scale", value)
        self.spec = replace(self.spec, qk_scale=scale, router_scale=self.spec.routing_scale)

    @property
    def backend(self) -> str:
        """`"auto"` or a backend's name; setting any other value raises ValueError."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = check_name(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "auto_pad":
            value = flag(name, value)
        if name == "spec":
            self._check_spec(value)
        super().__setattr__(name, value)

    def _check_spec(self, spec: AttentionSpec) -> None:
        if not isinstance(spec, AttentionSpec):
            raise TypeError(f"spec must be an AttentionSpec, got {spec!r}")
        old = vars(self).get("spec", spec)
        if (spec.dim, spec.qk_dim) != (old.dim, old.qk_dim):
            raise ValueError(
                f"spec must keep dim={old.dim} and qk_dim={old.qk_dim}, which determine the parameters' "
                f"shapes, got {spec}"
            )

    def settable(self) -> dict[str, Any]:
        """The attributes that can be set, by name, with their values."""
        kind = type(self)
        properties = [name for name in dir(kind) if getattr(getattr(kind, name), "fset", None)]
        return {name: getattr(self, name) for name in (*properties, "auto_pad") if name not in self._fixed}

    def _leaf(self, x: Any, *others: Any) -> Any:
        """Adds a call of this module, as one node, to the graph that `torch.fx` traces; returns its proxy.

        Args:
            x: the forward's first argument, which is not a tensor: the proxy of a map.
            others: the forward's other arguments.

        Raises:
            TypeError: if `x` is not a proxy, or if this module itself is the root of the trace.
        """
        if not isinstance(x, torch.fx.Proxy):
            raise TypeError(f"x must be a tensor, got {x!r}")
        tracer: Any = x.tracer
        path = tracer.path_of_module(self)
        if not path:
            raise TypeError(
                "torch.fx cannot trace the attention itself, only a model that has it as a leaf: "
                "torch.fx.symbolic_trace(nn.Sequential(attention))"
            )
        return tracer.create_proxy("call_module", path, (x, *others), {})

    def __prepare_scriptable__(self) -> nn.Module:
        """Raises TypeError: `torch.jit.script` calls this, and would otherwise fail later, less clearly."""
        raise TypeError(
            "torch.jit.script cannot compile bi-level routing attention; use torch.jit.trace, torch.export "
            "or torch.compile"
        )

    def _with_lepe(self, out: Tensor, call: Call) -> Tensor:
        """Calls LePE's layer and adds its output to `out`; returns `out` itself if there is no such layer.

        Args:
            out: `(N, H, W, dim)`: the output of the call, without LePE.
            call: the call; the layer gets its values.
        """
        lepe = self._modules.get("lepe")
        if lepe is None:
            return out
        qkv = padded(call) if self.spec.counts_padding else call.qkv
        value = qkv[..., -self.spec.dim :].permute(0, 3, 1, 2)
        added = apply("lepe", lepe, value.contiguous(memory_format=torch.channels_last))
        if added.shape != value.shape:
            raise ValueError(f"lepe must return {tuple(value.shape)}, got {tuple(added.shape)}")
        return out + added.permute(0, 2, 3, 1)[:, : out.shape[1], : out.shape[2]]
