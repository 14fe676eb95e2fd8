"""The Triton backend: hands packed projections to the launch."""

from torch import Tensor

from ..kernels import launch
from ..kernels.region_grid import RegionGrid
from ..spec import AttentionSpec


def region_routing(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """See `torch_backend.region_routing`."""
    return launch.region_routing(qkv, _problem(qkv, spec))


def attention_forward(qkv: Tensor, r_idx: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """See `torch_backend.attention_forward`; `lse` is to the base 2."""
    return launch.attention_forward(qkv, r_idx, _problem(qkv, spec))


def attention_backward(
    grad_out: Tensor, qkv: Tensor, r_idx: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> Tensor:
    """See `torch_backend.attention_backward`."""
    return launch.attention_backward(grad_out, qkv, r_idx, out, lse, _problem(qkv, spec))


def _problem(qkv: Tensor, spec: AttentionSpec) -> launch.Problem:
    grid = RegionGrid.of_windows(qkv.shape[1], qkv.shape[2], spec.n_win)
    return launch.Problem(
        batch=qkv.shape[0],
        region_height=grid.region_height,
        region_width=grid.region_width,
        n_win=spec.n_win,
        topk=spec.topk,
        num_heads=spec.num_heads,
        qk_head_dim=spec.qk_head_dim,
        v_head_dim=spec.v_head_dim,
        scale=spec.scale,
    )
