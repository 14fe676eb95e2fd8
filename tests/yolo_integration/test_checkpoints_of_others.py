"""Weights of other people's YOLO models and of BiFormer load into the blocks, although their names differ."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml as pyyaml
from other_implementations import AuthorsBlock, AuthorsNCHW, Permuting, original
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER

from bra_triton import BiLevelRoutingAttention, replace_attention
from bra_triton.modules.permuted import PermutedBiLevelRoutingAttention
from bra_triton.yolo_integration import (
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    NCHWBiLevelRoutingAttention2d,
)

SIZE = {"num_heads": 2, "n_win": 2, "topk": 3}
# Rounding of float32 gives 1 to 4e-7; a wrong weight gives 1e-1 and more.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def _authors_nchw() -> nn.Module:
    return AuthorsNCHW(12, **SIZE, lepe=nn.Conv2d(12, 12, 3, padding=1, groups=12))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: Permuting(dim=12, **SIZE), BiLevelRoutingAttention2d),
        (_authors_nchw, NCHWBiLevelRoutingAttention2d),
        (lambda: AuthorsBlock(12, original(12, **SIZE)), BiFormerBlock),
    ],
    ids=["the original", "the authors' NCHW class", "the authors' block"],
)
def test_load_state_dict_is_strict_and_the_outputs_are_equal(theirs, ours) -> None:
    expected, block = theirs(), ours(12, SIZE)
    block.load_state_dict(expected.state_dict(), strict=True)
    x = torch.randn(1, 12, 4, 6)
    torch.testing.assert_close(block(x), expected(x), **CLOSE)


def test_stages_of_biformer() -> None:
    """Stages built like those of the released models, with the same names: `stages.1.0.mlp.3.weight`."""
    stages = [
        nn.ModuleList(nn.Sequential(*(block() for _ in range(2))) for _ in range(2))
        for block in (lambda: AuthorsBlock(12, original(12, **SIZE)), lambda: BiFormerBlock(12, SIZE))
    ]
    theirs, ours = (nn.ModuleDict({"stages": stage}) for stage in stages)
    assert "stages.1.0.mlp.3.weight" in theirs.state_dict()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_load_of_a_yolo_model_with_a_paste(caplog, monkeypatch) -> None:
    """All items are transferred. Without renaming, Ultralytics would skip the attention's items, and only the
    number of items in the log would show it."""
    model, source = (YOLO("yolo26n-bra.yaml", verbose=False).model for _ in range(2))
    attention = source.model[11].attn
    assert type(attention) is BiLevelRoutingAttention
    paste = Permuting(dim=attention.dim, num_heads=attention.num_heads, n_win=7, auto_pad=True)
    for name in ("i", "f", "type", "np"):
        setattr(paste, name, getattr(source.model[11], name))
    source.model[11] = paste
    assert "model.11.lepe.weight" in source.state_dict()
    monkeypatch.setattr(LOGGER, "propagate", True)
    with caplog.at_level(logging.INFO):
        model.load(source)
    items = len(model.state_dict())
    assert f"Transferred {items}/{items} items" in caplog.text
    assert "keep their initial values" not in caplog.text
    for theirs, ours in zip(paste.parameters(), model.model[11].parameters(), strict=True):
        assert torch.equal(theirs, ours)


class Paste(Permuting):
    """A class for a yaml's row, with the positional arguments that pasted copies of the original take."""

    def __init__(self, dim: int, num_heads: int, n_win: int) -> None:
        super().__init__(dim=dim, num_heads=num_heads, n_win=n_win, auto_pad=True)


class ReplacingTrainer(DetectionTrainer):
    """The trainer of docs/migration.md."""

    def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        return replace_attention(super().get_model(*args, **kwargs)).model


@pytest.mark.usefixtures("short_training")
def test_a_trainer_that_replaces_trains_ours_from_a_yaml_that_names_a_paste(
    train_arguments: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer must replace the attention, because Ultralytics builds a new model for each training."""
    monkeypatch.setattr(tasks, "Paste", Paste, raising=False)
    yaml = {**tasks.yaml_model_load("yolo26n-bra.yaml"), "scale": "n"}
    yaml["backbone"][-1] = [-1, 1, "Paste", [256, 8, 7]]
    path = tmp_path / "yolo26n-paste.yaml"
    path.write_text(pyyaml.safe_dump(yaml))
    model = YOLO(path, verbose=False)
    model.train(**train_arguments, trainer=ReplacingTrainer, epochs=1, project=str(tmp_path), name="train")
    for trained in (model.trainer.model, model.trainer.ema.ema):
        assert type(trained.model[11]) is PermutedBiLevelRoutingAttention
    saved = YOLO(tmp_path / "train" / "weights" / "last.pt").model
    assert type(saved.model[11]) is PermutedBiLevelRoutingAttention
