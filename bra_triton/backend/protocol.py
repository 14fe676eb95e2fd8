"""The protocol that every backend implements."""

from typing import Protocol

from torch import Tensor

from ..call import Call, Request
from ..regional_call import RegionalCall


class Backend(Protocol):
    """One way to compute the attention.

    Attributes:
        name: the name by which users ask for this backend.
    """

    name: str

    def why_not(self, request: Request) -> str | None:
        """The reason why this backend cannot serve the call, or None if it can.

        The choice of a backend depends on it, and error messages quote it.
        """

    def attend(self, call: Call) -> Tensor:
        """Routing, attention and LePE: `(N, H, W, dim)`; differentiable."""

    def route(self, call: Call) -> tuple[Tensor, Tensor]:
        """Routing alone.

        Returns:
            `r_weight` (float32; float64 for float64), differentiable if the specification has `diff_routing`,
            and `r_idx` (int64), both `(N, P, topk)`.
        """

    def attend_regional(self, call: RegionalCall) -> Tensor:
        """Attention to given regions: `(N, C_v, H, W)`; differentiable."""
