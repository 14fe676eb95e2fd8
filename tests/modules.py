"""Helpers that compare a module with its oracle: a copy of it in float64 on the reference backend."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from bra_triton import NCHWBiLevelRoutingAttention, reference
from bra_triton.call import Call


def reference_of(module: nn.Module) -> nn.Module:
    """A copy of the module in float64 on the reference backend."""
    oracle = copy.deepcopy(module).double()
    oracle.backend = "reference"
    return oracle


def run(
    module: nn.Module, x: Tensor, grad_out: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor | None]:
    """Output, input gradient and parameter gradients, by name; `forward` is the module's by default."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = (forward or module)(x)
    out.backward(grad_out.to(out))
    return {"out": out.detach(), "x": x.grad, **{k: p.grad for k, p in module.named_parameters()}}


def nchw_call(module: NCHWBiLevelRoutingAttention, projected: Tensor) -> Call:
    """The attention call of an NCHW module, given the output of its projection, `(N, 3*dim, H, W)`."""
    qkv = projected.permute(0, 2, 3, 1)
    grid = module.grid(projected[:, : module.spec.dim])
    padding = qkv.new_zeros(qkv.shape[-1]) if grid.is_padded else None
    return Call(qkv, module.spec, padding=padding, given_grid=grid)


def region_means(call: Call) -> tuple[Tensor, Tensor]:
    """Region queries and keys that the reference routes by, `(N, P, qk_dim)` each."""
    spec, qkv = call.spec, reference.padded(call)
    means = reference._region_means(qkv[..., : 2 * spec.qk_dim], call.grid, spec.counts_padding)
    query, key = means.split(spec.qk_dim, dim=-1)
    return call.emb(query), call.emb(key)
