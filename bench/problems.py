"""The catalogue of problems that the benches, the tuner, the kernel report and the tests share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from bra_triton.kernels.grid import RegionGrid
from bra_triton.kernels.pooling.problem import MAX, MEAN, WEIGHTED
from bra_triton.kernels.problem import PackedAttention, Settings
from bra_triton.spec import AttentionSpec


@dataclass(frozen=True)
class Problem:
    """One attention over a packed projection: sizes and mode, enough to launch it."""

    name: str = field(compare=False)  # in options; problems that differ only in their names are equal
    batch: int
    height: int  # of the map; a side that is no multiple of `n_win` is padded
    width: int
    dim: int  # channels of the values, all heads together
    num_heads: int
    n_win: int  # regions along each side of the map
    topk: int  # regions that every region attends to
    routing_weight: str = "none"  # or "soft" or "hard"
    kv_per_win: int | None = None  # keys along each side of a region; None: as many as queries
    kv_pooling: str | None = None  # the mode of a `RegionPooling`; None if keys and values are given
    side_dwconv: int = 3  # side of LePE's kernel; 0 for no LePE
    qk_dim: int = 0  # channels of the queries, all heads together; 0 stands for `dim`

    def __post_init__(self) -> None:
        if not self.qk_dim:
            object.__setattr__(self, "qk_dim", self.dim)

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.height}x{self.width}x{self.dim}"
        weight = "" if self.routing_weight == "none" else f" {self.routing_weight}"
        return f"{sizes} heads {self.num_heads} n_win {self.n_win} topk {self.topk}{weight}"

    @property
    def head_dims(self) -> tuple[int, int]:
        """Channels of a query or key, and of a value, in one head."""
        return self.qk_dim // self.num_heads, self.dim // self.num_heads

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a routing weight nor down-sampling of keys and values."""
        return self.routing_weight == "none" and self.kv_per_win is None

    @property
    def grid(self) -> RegionGrid:
        """Regions of the queries."""
        return RegionGrid.of_windows(self.height, self.width, self.n_win)

    @property
    def kv_grid(self) -> RegionGrid:
        """Regions of the keys."""
        return self.grid if self.kv_per_win is None else self.grid.pooled(self.kv_per_win, self.kv_per_win)

    @property
    def useful_scores(self) -> int:
        """Scores that the result depends on: every query with each of its keys, in every head."""
        return self.batch * self.num_heads * self.settings.token_scores(self.kv_grid.region_tokens)

    @property
    def settings(self) -> Settings:
        """The numbers, as the kernels take them; raises ValueError if they do not fit each other."""
        return AttentionSpec(**self._spec_arguments).settings(self.grid)

    @property
    def _spec_arguments(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("dim", "qk_dim", "num_heads", "n_win", "topk")}
        weight = self.routing_weight
        return {**sizes, "soft_routing": weight == "soft", "diff_routing": weight != "none"}

    @property
    def module_arguments(self) -> dict[str, Any]:
        """Arguments of `BiLevelRoutingAttention`, except for down-sampling of keys and values."""
        return {**self._spec_arguments, "side_dwconv": self.side_dwconv, "auto_pad": self.grid.is_padded}

    def attention(self, make: Callable[..., Tensor], means: Tensor | None = None) -> PackedAttention[Tensor]:
        """The attention as the kernels take it; `make` returns a tensor of the sizes it is called with.

        `means` `(N, P, 2*qk_dim)` float32 are region queries and keys, by default those of the map.
        """
        packed_dim, side, keys = 2 * self.qk_dim + self.dim, self.side_dwconv, self.kv_grid
        pooled = None if self.kv_per_win is None else (keys.height, keys.width, packed_dim - self.qk_dim)
        return PackedAttention(
            make(self.batch, self.height, self.width, packed_dim),
            None if pooled is None else make(self.batch, *pooled),
            make(packed_dim) if self.grid.is_padded else None,
            means,
            make(self.dim, 1, side, side) if side else None,
            make(self.dim) if side else None,
            self.settings,
        )


def _by_name(*problems: Problem) -> dict[str, Problem]:
    return {problem.name: problem for problem in problems}


# Maps as models have them; they are tuned, timed and reported by default.
MODELS = _by_name(
    Problem("yolo_p3", 16, 80, 80, 64, 2, 8, 4),  # YOLO26 at 640 pixels: stride 8
    Problem("yolo_p4", 16, 40, 40, 128, 4, 8, 4),
    Problem("yolo_p5", 16, 20, 20, 256, 8, 8, 4),  # padded to 24 x 24
    Problem("biformer_stage1", 64, 56, 56, 64, 2, 7, 1),  # BiFormer-T at 224 pixels
    Problem("biformer_stage2", 64, 28, 28, 128, 4, 7, 4),
    Problem("biformer_stage3", 64, 14, 14, 256, 8, 7, 16),
    Problem("biformer_stage4", 64, 7, 7, 512, 16, 7, 49),  # every region attends to all
    Problem("high_resolution", 4, 160, 160, 64, 2, 8, 4),  # YOLO26 at 1280 pixels: stride 8
    Problem("yolo_p3_head64", 16, 80, 80, 128, 2, 8, 4),
    Problem("high_resolution_head64", 4, 160, 160, 128, 2, 8, 4),
)
_P3 = MODELS["yolo_p3"]
# For the report: modes with kernels that the models above do not launch.
MODES = _by_name(
    replace(_P3, name="yolo_p3_soft", routing_weight="soft"),
    replace(_P3, name="yolo_p3_meanpool", kv_per_win=5, kv_pooling=MEAN),
    replace(_P3, name="yolo_p3_maxpool", kv_per_win=5, kv_pooling=MAX),
    replace(_P3, name="yolo_p3_conv", kv_per_win=5, kv_pooling=WEIGHTED),
)
_OTHERS = _by_name(
    # With the default `n_win` of yaml rows, at 640 pixels: regions of 256, 64 and 16 tokens fill their tiles.
    replace(_P3, name="yolo_p3_n_win_5", n_win=5),
    replace(MODELS["yolo_p4"], name="yolo_p4_n_win_5", n_win=5),
    replace(MODELS["yolo_p5"], name="yolo_p5_n_win_5", n_win=5),
    # For a quick try of a bench.
    Problem("tiny", 1, 8, 8, 32, 1, 2, 2),
    Problem("tiny_padded", 1, 7, 7, 32, 1, 2, 2),
    # So small that Python takes most of the time of a call.
    Problem("host", 1, 8, 8, 64, 2, 4, 2),
    # rayleizhu/BiFormer's issue 21: gathered keys and values took about 100 GB.
    Problem("issue_21", 1, 600, 500, 20, 4, 7, 4),
)
PROBLEMS = MODELS | MODES | _OTHERS
