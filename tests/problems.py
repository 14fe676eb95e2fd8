"""The cases in which the attention is tested, the reason for each, and how results are compared."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bra_triton.spec import AttentionSpec


@dataclass(frozen=True)
class Case:
    """One attention: map and specification."""

    name: str
    why: str
    height: int
    width: int
    dim: int
    num_heads: int
    n_win: int
    topk: int
    qk_dim: int | None = None
    batch: int = 1

    @property
    def spec(self) -> AttentionSpec:
        qk_dim = self.qk_dim or self.dim
        return AttentionSpec(self.dim, qk_dim, self.num_heads, self.n_win, self.topk)

    @property
    def padded(self) -> tuple[int, int]:
        return tuple(-(-side // self.n_win) * self.n_win for side in (self.height, self.width))


CASES = [
    Case("biformer_stage1", "BiFormer's first stage: 64-token regions, one routed", 56, 56, 64, 2, 7, 1),
    Case("biformer_stage2", "second stage: 16-token regions", 28, 28, 32, 1, 7, 4),
    Case(
        "biformer_stage3",
        "third stage: 4-token regions, 16 routed: lists longer than a region",
        14,
        14,
        32,
        1,
        7,
        16,
    ),
    Case("short_regions", "as biformer_stage3, with 16 regions: fast when interpreted", 8, 8, 32, 1, 4, 8),
    Case("all_regions", "topk = P: dense attention; every inverse row is full", 12, 12, 32, 1, 3, 9, batch=2),
    Case(
        "all_regions_padded",
        "topk = P on a padded map: dense attention in which padding takes part",
        7,
        10,
        16,
        1,
        4,
        16,
    ),
    Case(
        "padded",
        "YOLO's P5 map: 20 is not a multiple of 8, so 4 rows and columns are padding",
        20,
        20,
        32,
        1,
        8,
        4,
    ),
    Case("rectangular", "regions of 3 x 4 tokens: rows and columns must not be swapped", 9, 12, 64, 2, 3, 3),
    Case("tokens_10x10", "YOLO's P3: 100 tokens, a full tile and a tail", 20, 20, 64, 2, 2, 2),
    Case("tokens_5x5", "YOLO's P5 at n_win 4: 25 tokens, odd sides", 10, 10, 64, 2, 2, 3),
    Case("head_5", "heads of 5 (upstream's issue 21): rows not aligned to 16 bytes", 8, 8, 20, 4, 2, 3),
    Case("head_24", "heads of 24: aligned, but no power of two", 8, 8, 72, 3, 2, 3),
    Case("head_64", "heads of 64", 8, 8, 64, 1, 2, 3),
    Case(
        "qk_narrow",
        "qk_dim < dim: heads of 16 and 32, packed thirds of unequal width",
        8,
        8,
        64,
        2,
        2,
        3,
        32,
    ),
    Case("qk_wide", "qk_dim > dim", 8, 8, 24, 3, 2, 3, 48),
    Case("batch_2", "two images: neither may see the other", 6, 6, 32, 1, 3, 4, batch=2),
    Case("head_200", "heads up to 256: 200 in a tile of 256", 4, 6, 200, 1, 2, 2),
    Case("one_region", "n_win 1: everything is one region", 6, 7, 32, 1, 1, 1),
    Case("one_token", "regions of a single token", 5, 5, 32, 1, 5, 5),
]
# Cases of 49 or 64 regions, which take the interpreter half a minute each; smaller ones cover the same code.
SLOW_INTERPRETED = {"biformer_stage1", "biformer_stage2", "biformer_stage3", "padded"}
CASES_BY_NAME = {case.name: case for case in CASES}


def cases_for(backends: tuple[str, ...], interpreted: bool) -> list[tuple[Case, str]]:
    """Every case on every backend, without those too slow for the interpreter."""
    return [
        (case, backend)
        for case in CASES
        for backend in backends
        if not (backend == "triton" and interpreted and case.name in SLOW_INTERPRETED)
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, divided by the norm of the float64 truth."""
    difference = torch.linalg.vector_norm(actual.double() - expected)
    return (difference / torch.linalg.vector_norm(expected).clamp_min(1e-300)).item()


def worst(errors: Iterable[float]) -> float:
    """The largest error. NaN counts as infinity, because `max` may ignore it."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def random_map(case: Case, device: torch.device, channels: int | None = None) -> Tensor:
    """Float64 values that float16 and bfloat16 hold exactly, `(N, H, W, channels)` on the padded map.

    Each region has a random mean, so that the regions' logits lie far apart and every precision routes alike.
    """
    height, width = case.padded
    shape = (case.batch, height, width, channels or case.spec.packed_dim)
    means = torch.randn(case.batch, case.n_win, case.n_win, shape[-1])
    x = torch.randn(shape)
    x += means.repeat_interleave(height // case.n_win, 1).repeat_interleave(width // case.n_win, 2)
    return x.bfloat16().double().to(device)
