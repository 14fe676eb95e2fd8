"""The fused backends, "triton" and "torch".

Both take the same path from a call to the operators; they differ only in the kernels that the operators call.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..call import Call, Request
from ..kernels.problem import PackedAttention
from ..operators import routing as routing_operators
from ..operators.attention import attend
from ..operators.regional import attend_regional
from ..regional_call import RegionalCall
from .availability import why_not_triton


class FusedBackend:
    """Computes with the functions of `kernels.fused_kernels(name)`; see `Backend`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, request: Request) -> str | None:
        """See `Backend`."""
        return why_not_triton(request) if self.name == "triton" else None

    def attend(self, call: Call) -> Tensor:
        """See `Backend`."""
        settings, qkv = call.settings, call.qkv.contiguous()
        weight, bias, padding = call.lepe_weight, call.lepe_bias, _padding(call, qkv)
        if weight is not None:
            weight, bias = _like(weight, qkv), None if bias is None else _like(bias, qkv)
        kv = means = None
        # Plans also depend on the size of `kv`, which the signature does not contain. So a call with
        # down-sampled keys and values does not use the plans that are kept for its signature.
        plans = call.known.plans if call.known and call.kv_downsampling is None else None
        if call.kv_downsampling is not None:
            kv = call.kv_downsampling.pool(qkv, settings.grid, padding, backend=self.name)
        # The kernels find the largest score before they apply the scale, so the scale must be positive. If it
        # is negative, the queries are negated instead, after the region means have been computed from them.
        is_negative = settings.scale < 0
        if call.has_router_layer or (is_negative and not settings.chooses_all):
            means = self._region_means(call, qkv, padding)
            means = means if settings.diff_routing else means.detach()
        if is_negative:
            query, key_value = qkv[..., : settings.qk_dim], qkv[..., settings.qk_dim :]
            qkv, settings = torch.cat((-query, key_value), -1), replace(settings, scale=-settings.scale)
        problem = PackedAttention(qkv, kv, padding, means, weight, bias, settings, plans)
        return attend(problem, self.name, call.eager)

    def route(self, call: Call) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        settings, qkv = call.settings, call.qkv.contiguous()
        padding = _padding(call, qkv)
        if not call.spec.diff_routing:
            qkv, padding = qkv.detach(), None if padding is None else padding.detach()
        query, key = self._region_means(call, qkv, padding).split(settings.qk_dim, dim=-1)
        r_weight, r_idx = routing_operators.choose_regions(
            query, key, settings.topk, settings.routing_scale, self.name
        )
        return r_weight, r_idx.long()

    def attend_regional(self, call: RegionalCall) -> Tensor:
        """See `Backend`."""
        query = call.query if call.scale > 0 else -call.query  # as in `attend`
        query, key, value = (x.permute(0, 2, 3, 1) for x in (query, call.key, call.value))
        out = attend_regional(
            (query, key, value),
            call.region_graph.int().contiguous(),
            (call.query_grid, call.kv_grid),
            call.num_heads,
            abs(call.scale),
            self.name,
        )
        return out.permute(0, 3, 1, 2)

    def _region_means(self, call: Call, qkv: Tensor, padding: Tensor | None) -> Tensor:
        """Region queries and keys `(N, P, 2*qk_dim)`, after the router's layer if there is one."""
        settings = call.settings
        means = routing_operators.means_of_regions(
            qkv,
            padding if settings.counts_padding else None,
            settings.qk_dim,
            settings.grid.numbers,
            self.name,
        )
        if not call.has_router_layer:
            return means
        return torch.cat([call.emb(x) for x in means.split(settings.qk_dim, dim=-1)], dim=-1)


def _padding(call: Call, qkv: Tensor) -> Tensor | None:
    """The call's padding as kernels take it; None also if the map does not need the one that was given."""
    if call.padding is None or not call.grid.is_padded:
        return None
    return _like(call.padding, qkv)


def _like(x: Tensor, qkv: Tensor) -> Tensor:
    """A parameter, contiguous and cast to the dtype of `qkv`, which is narrower under autocast."""
    return (x if x.dtype == qkv.dtype else x.to(qkv.dtype)).contiguous()
