"""The Triton backend: the kernels' launches under the names that every backend has (see `torch_backend`)."""

from ..kernels.launches.attention import attention_backward, attention_forward
from ..kernels.launches.lepe import lepe_backward
from ..kernels.launches.pooling import pool_backward, pool_forward
from ..kernels.launches.routing import region_means, route, route_backward

__all__ = [
    "attention_backward",
    "attention_forward",
    "lepe_backward",
    "pool_backward",
    "pool_forward",
    "region_means",
    "route",
    "route_backward",
]
