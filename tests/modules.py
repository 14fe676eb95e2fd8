"""How a module is compared with its oracle: the same module, on the reference and in float64."""

import copy

from torch import Tensor, nn


def reference_of(module: nn.Module) -> nn.Module:
    """A copy of the module in float64 on the reference backend."""
    oracle = copy.deepcopy(module).double()
    oracle.backend = "reference"
    return oracle


def run(module: nn.Module, x: Tensor, grad_out: Tensor) -> dict[str, Tensor | None]:
    """Output, input gradient and parameter gradients, by name."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = module(x)
    out.backward(grad_out.to(out))
    return {"out": out.detach(), "x": x.grad, **{k: p.grad for k, p in module.named_parameters()}}
