"""The models in timm's registry, with the attributes and methods that timm needs to extract feature maps."""

from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from ..arguments import flag, one_of, whole
from .model import VARIANTS, BiFormer, check_number

# No addresses of weights: the authors release them on a file host that has no stable addresses.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
            "first_conv": "downsample_layers.0.0",
            "classifier": "head",
        }
        for name in VARIANTS
    }
)


class TimmBiFormer(BiFormer):
    """`BiFormer` with the arguments, attributes and methods that timm's models have; the same parameters.

    Args:
        drop_rate: probability that a channel of the pooled features is dropped in training.
        global_pool: `"avg"`; or `""`, with `num_classes=0`, for features that are not pooled.
        **arguments: those of `BiFormer`.
    """

    global_pool = "avg"
    drop_rate = 0.0  # of models that were pickled before there was this argument

    def __init__(self, *, drop_rate: float = 0.0, global_pool: str = "avg", **arguments: Any) -> None:
        super().__init__(**arguments)
        check_number("drop_rate", drop_rate, 0, 1)
        self.drop_rate = drop_rate
        self._set_pool(global_pool, self.num_classes)
        self.num_features = self.head_hidden_size = self.embed_dim[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(self.embed_dim)
        ]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """`BiFormer.reset_classifier`; also sets `global_pool`, unless it is None.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        self._set_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes)

    def _set_pool(self, global_pool: str, num_classes: int) -> None:
        if not one_of("global_pool", global_pool, ("avg", "")) and num_classes:
            raise ValueError(f"num_classes must be 0 without pooling (global_pool=''), got {num_classes}")
        self.global_pool = global_pool

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps the output of `forward_features` to logits, or with `pre_logits` to the classifier's input."""
        if not self.global_pool:
            return x
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if flag("pre_logits", pre_logits) else self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The patterns by which timm groups parameters by their depth, for a learning rate of each layer."""
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:downsample_layers|stages)\.(\d+)" if coarse else blocks,
        }

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the stages in `indices` and, unless `intermediates_only`, the final features.

        Args:
            x: images, `(N, in_chans, H, W)`.
            indices: numbers of stages; an int stands for that many of the last stages, None for all stages.
            norm: must be False, because the classifier's norm fits only the last stage.
            output_fmt: must be `"NCHW"`.
            intermediates_only: return only the list of maps.

        Returns:
            The list of maps, or the pair of the final features and that list.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        if norm or output_fmt != "NCHW":
            raise ValueError(f"norm must be False and output_fmt 'NCHW', got {norm!r} and {output_fmt!r}")
        count = len(self.stages)
        if indices is None or isinstance(indices, int):
            wanted = [*range(count)][-(count if indices is None else whole("indices", indices)) :]
        else:
            wanted = [*indices]
        if (isinstance(indices, int) and indices > count) or any(not -count <= i < count for i in wanted):
            raise ValueError(f"indices must be numbers of the {count} stages, or how many, got {indices!r}")
        maps = self.stage_maps(x)
        intermediates = [maps[stage] for stage in wanted]
        return intermediates if intermediates_only else (self.norm(maps[-1]), intermediates)


def _build(name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    stages = tuple(range(len(VARIANTS[name]["depth"])))
    return build_model_with_cfg(
        TimmBiFormer,
        name,
        pretrained,
        feature_cfg={"out_indices": stages, "feature_cls": "getter"},
        **{**VARIANTS[name], **arguments},
    )


@register_model
def biformer_tiny(pretrained: bool = False, **arguments: Any) -> Any:
    """BiFormer-T, as timm builds it."""
    return _build("biformer_tiny", pretrained, arguments)


@register_model
def biformer_small(pretrained: bool = False, **arguments: Any) -> Any:
    """BiFormer-S, as timm builds it."""
    return _build("biformer_small", pretrained, arguments)


@register_model
def biformer_base(pretrained: bool = False, **arguments: Any) -> Any:
    """BiFormer-B, as timm builds it."""
    return _build("biformer_base", pretrained, arguments)
