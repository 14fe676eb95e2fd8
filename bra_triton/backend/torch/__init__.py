"""The torch backend: `FusedKernels` on any device, in any floating dtype, with memory linear in the map."""

from .attention import attend_routed, attend_routed_backward
from .packed import attend, attend_backward, saved_like
from .pooling import pool, pool_backward
from .routing import region_means, route, route_backward

__all__ = [
    "attend",
    "attend_backward",
    "attend_routed",
    "attend_routed_backward",
    "pool",
    "pool_backward",
    "region_means",
    "route",
    "route_backward",
    "saved_like",
]
