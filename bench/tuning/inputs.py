"""Input sets to time a configuration on, the plans that are timed, and what they must compute."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bra_triton.backend import torch as torch_kernels
from bra_triton.bench import measure
from bra_triton.bench.machine_code.launches import plan_pass
from bra_triton.bench.problems import Problem
from bra_triton.kernels import tiles
from bra_triton.kernels.plan import Plan
from bra_triton.kernels.problem import Needs, PackedAttention
from bra_triton.kernels.routing.lists import ROUTED
from bra_triton.kernels.tiles import FORWARD, KEY_VALUE_GRADIENT, QUERY_GRADIENT

# Inputs are drawn in so many sets that they do not all stay in a cache.
_SETS, _SET_BYTES = (2, 8), 256 << 20
Run = Callable[[], dict[str, Tensor]]


class Inputs:
    """Input sets of one problem, and what the first of them must give."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: torch.device) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def draw_set() -> PackedAttention[Tensor]:
            # Region queries and keys are given, in float32: of rounded means another tile, or the float32
            # computation, might choose other regions.
            means = draw(problem.batch, problem.grid.n_regions, 2 * problem.qk_dim, dtype=torch.float32)
            return problem.attention(draw, means)

        first = draw_set()
        n_sets = min(max(_SET_BYTES // (2 * first.qkv.nbytes), _SETS[0]), _SETS[1])
        self.sets = [first, *(draw_set() for _ in range(n_sets - 1))]
        self.grad_out = draw(problem.batch, problem.height, problem.width, problem.dim)
        forward, _ = self._plans()
        self.kept = [forward.run(*each.tensors)[-1] for each in self.sets]
        self.expected = self._expected()

    def runs(self, kernel: str) -> list[Run]:
        """For every set a pass that launches the kernel, with the tiles in force now.

        It returns what the kernel computes, and what the pass adds to that: LePE and its gradient.
        """
        forward, backward = self._plans()

        def run(each: PackedAttention[Tensor], kept: Tensor) -> dict[str, Tensor]:
            if kernel == FORWARD:
                return {"output": forward.run(*each.tensors)[0]}
            return self._parts(kernel, *backward.run(*each.tensors, self.grad_out, None, kept))

        return [partial(run, each, kept) for each, kept in zip(self.sets, self.kept, strict=True)]

    @tiles.use_form(ROUTED)  # others have tiles of their own, which are in no table
    def _plans(self) -> tuple[Plan, Plan]:
        return plan_pass(self.sets[0])

    def check(self, run: Run) -> None:
        """Raises WrongResultError where the first of `runs` computes something else."""
        torch.use_deterministic_algorithms(True, warn_only=True)  # new memory holds NaN
        try:
            measure.check(run(), self.expected, measure.TOLERANCE[self.grad_out.dtype])
        finally:
            torch.use_deterministic_algorithms(False)

    def _parts(self, kernel: str, grad_qkv: Tensor, *others: Tensor | None) -> dict[str, Tensor]:
        """What a kernel computes of the gradients of a pass; of others the first is that of the means."""
        qk_dim = self.problem.qk_dim
        query, key, value = grad_qkv.split((qk_dim, qk_dim, self.problem.dim), dim=-1)
        if kernel == KEY_VALUE_GRADIENT:
            return {"dK": key, "dV": value}
        learns, grad_means = self.problem.settings.diff_routing, others[0]
        return {"dQ": query, **({"dR": grad_means} if learns and grad_means is not None else {})}

    def _expected(self) -> dict[str, Tensor]:
        first = self.sets[0]
        single = (None if x is None else x.float() for x in first.tensors)
        exact: PackedAttention[Tensor] = PackedAttention(*single, first.settings)  # type: ignore[arg-type, call-arg]
        out, saved = torch_kernels.attend(exact, trains=True)
        found = torch_kernels.attend_backward(self.grad_out.float(), exact, None, saved, Needs(means=True))
        maps = (found.qkv, found.means)
        return {"output": out} | self._parts(QUERY_GRADIENT, *maps) | self._parts(KEY_VALUE_GRADIENT, *maps)
