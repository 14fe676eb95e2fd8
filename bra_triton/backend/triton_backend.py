"""The Triton backend: the kernels' launches under the names that every backend has (see `torch_backend`)."""

from ..kernels.attention.launch import attention_backward, attention_forward
from ..kernels.lepe.launch import lepe_backward
from ..kernels.pooling.launch import pool_backward, pool_forward
from ..kernels.routing.launch import region_means, route, route_backward

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
