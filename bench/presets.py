"""The problems that the report, the benchmark and the tuner speak of, as data."""

from dataclasses import dataclass

from bra_triton.bench.machine_code.cost_model import ProblemSizes
from bra_triton.bench.machine_code.launches import Setting
from bra_triton.kernels.pooling.problem import MAX, MEAN, WEIGHTED


@dataclass(frozen=True)
class Preset:
    """One routed attention as a model runs it, with heads of one width.

    Attributes:
        name: how it is asked for.
        why: where it occurs.
        batch: images.
        height: rows of the map.
        width: columns of the map.
        dim: channels of queries, keys and values alike.
        num_heads: attention heads.
        n_win: regions a side.
        topk: regions that every region attends to.
        routing_weight: "none", "soft" or "hard".
        kv_per_win: keys a side of a region; None for as many as queries.
        kv_pooling: what makes them of a region's tokens, one of `pooling_problem.MODES`.
    """

    name: str
    why: str
    batch: int
    height: int
    width: int
    dim: int
    num_heads: int
    n_win: int
    topk: int
    routing_weight: str = "none"
    kv_per_win: int | None = None
    kv_pooling: str | None = None

    @property
    def region_height(self) -> int:
        """Rows of a region; the map is padded to whole regions."""
        return -(-self.height // self.n_win)

    @property
    def region_width(self) -> int:
        """Columns of a region."""
        return -(-self.width // self.n_win)

    @property
    def region_tokens(self) -> int:
        """Tokens of a region, `S`."""
        return self.region_height * self.region_width

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads

    @property
    def setting(self) -> Setting:
        """What a launch needs to know of it."""
        sizes = (self.batch, self.height, self.width, self.n_win, self.topk, self.num_heads)
        modes = (self.kv_per_win, self.kv_pooling, self.routing_weight)
        return Setting(*sizes, self.head_dim, self.head_dim, *modes)

    def sizes(self, element_bytes: int = 2, masked: bool = False) -> ProblemSizes:
        """What the cost of its attention depends on."""
        tokens, heads = self.region_tokens, (self.num_heads, self.head_dim, self.head_dim)
        kv_tokens = tokens if self.kv_per_win is None else self.kv_per_win**2
        problem = (self.batch, self.n_win**2, tokens, self.topk, kv_tokens, *heads)
        sizes = ProblemSizes(*problem, element_bytes, masked=masked)
        return sizes.merged() if self.setting.chooses_all else sizes


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("yolo_p3", "YOLO26 at 640: stride 8", 16, 80, 80, 64, 2, 8, 4),
        Preset("yolo_p4", "YOLO26 at 640: stride 16", 16, 40, 40, 128, 4, 8, 4),
        Preset("yolo_p5", "YOLO26 at 640: stride 32, padded to 24x24", 16, 20, 20, 256, 8, 8, 4),
        Preset("biformer_stage1", "BiFormer-T at 224", 64, 56, 56, 64, 2, 7, 1),
        Preset("biformer_stage2", "BiFormer-T at 224", 64, 28, 28, 128, 4, 7, 4),
        Preset("biformer_stage3", "BiFormer-T at 224", 64, 14, 14, 256, 8, 7, 16),
        Preset("biformer_stage4", "BiFormer-T at 224: dense", 64, 7, 7, 512, 16, 7, 49),
        Preset("high_resolution", "YOLO26 at 1280: stride 8", 4, 160, 160, 64, 2, 8, 4),
        Preset("yolo_p3_head64", "heads of 64 at stride 8", 16, 80, 80, 128, 2, 8, 4),
        Preset("high_resolution_head64", "heads of 64 on a large map", 4, 160, 160, 128, 2, 8, 4),
    )
}

_P3 = (16, 80, 80, 64, 2, 8, 4)
# Modes with kernels that the presets do not launch, for the report.
MODES = {
    preset.name: preset
    for preset in (
        Preset("yolo_p3_soft", "a factor for every routed region, and its gradient", *_P3, "soft"),
        Preset("yolo_p3_meanpool", "keys of 2x2 tokens' mean", *_P3, "none", 5, MEAN),
        Preset("yolo_p3_maxpool", "keys of 2x2 tokens' maximum", *_P3, "none", 5, MAX),
        Preset("yolo_p3_conv", "keys of 2x2 tokens by a convolution", *_P3, "none", 5, WEIGHTED),
    )
}
