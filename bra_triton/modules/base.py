"""What the drop-in modules have in common: the original's attributes, and what may be set of them."""

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

FIXED_BY_PARAMETERS = "it shapes the parameters; give it to the constructor"
NEVER_CALLED = "no backend would call it"
# None of them is optional but `lepe`, which the original makes a function where there is none.
_LAYERS = ("lepe", "qkv", "wo", "router", "kv_down", "qkv_linear", "output_linear")


def number(name: str) -> property:
    """A number of the specification; setting it makes another one, which checks as the constructor does."""

    def read(module: "Specified") -> Any:
        return getattr(module.spec, name)

    def write(module: "Specified", value: Any) -> None:
        module.spec = replace(module.spec, **{name: value})

    return property(read, write, doc=f"See `AttentionSpec.{name}`.")


class Specified(nn.Module):
    """A module with a specification, some of whose attributes may not be set.

    Attributes:
        spec: what is computed.
    """

    spec: AttentionSpec
    # Attributes that cannot be set, and why: what the original had under these names would be ignored here.
    _fixed: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed:
            raise AttributeError(f"{name} cannot be set, got {value!r}: {self._fixed[name]}")
        if isinstance(getattr(type(self), name, None), property):
            # nn.Module would make a parameter or a submodule of it, which nothing reads.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Attention(Specified, TakesNames):
    """The base of the drop-in modules.

    `n_win`, `num_heads`, `topk`, `scale`, `soft_routing`, `diff_routing`, `auto_pad` and `backend` may be set
    at any time, and are checked as by the constructor. What shapes the parameters can be read; setting it
    raises AttributeError.
    """

    _fixed: ClassVar[dict[str, str]] = {"dim": FIXED_BY_PARAMETERS, "attn_act": NEVER_CALLED}

    dim = number("dim")
    n_win = number("n_win")
    num_heads = number("num_heads")
    topk = number("topk")
    soft_routing = number("soft_routing")
    diff_routing = number("diff_routing")

    @property
    def scale(self) -> float:
        """Factor of the tokens' logits; as in the original, setting it leaves that of the router's alone."""
        return self.spec.scale

    @scale.setter
    def scale(self, value: float) -> None:
        scale = factor("scale", value)
        self.spec = replace(self.spec, qk_scale=scale, router_scale=self.spec.routing_scale)

    @property
    def backend(self) -> str:
        """`"auto"` or a backend's name; setting another raises ValueError."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = check_name(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "auto_pad":
            value = flag(name, value)
        if name in _LAYERS and not isinstance(value, nn.Module) and not (name == "lepe" and value is None):
            raise TypeError(f"{name} must be an nn.Module, got {value!r}")
        super().__setattr__(name, value)

    def _leaf(self, x: Any, *others: Any) -> Any:
        """The module as a leaf of the graph that `torch.fx` traces, of which `x` is a node.

        Args:
            x: the forward's first argument, no tensor.
            others: what follows it.

        Raises:
            TypeError: where `x` is anything else, or the module is all that is traced.
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
        """Refuses: `torch.jit.script`, which asks for this, would fail somewhere inside."""
        raise TypeError(
            "torch.jit.script cannot compile bi-level routing attention; use torch.jit.trace, torch.export "
            "or torch.compile"
        )

    def _with_lepe(self, out: Tensor, call: Call) -> Tensor:
        """The output `(N, H, W, dim)` of a call without LePE, with what LePE's layer adds if there is one."""
        lepe = self._modules.get("lepe")
        if lepe is None:
            return out
        qkv = padded(call) if self.spec.counts_padding else call.qkv
        value = qkv[..., -self.spec.dim :].permute(0, 3, 1, 2)
        added = apply("lepe", lepe, value.contiguous(memory_format=torch.channels_last))
        if added.shape != value.shape:
            raise ValueError(f"lepe must return {tuple(value.shape)}, got {tuple(added.shape)}")
        return out + added.permute(0, 2, 3, 1)[:, : out.shape[1], : out.shape[2]]
