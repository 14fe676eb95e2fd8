"""Weights of other people's YOLO models and of BiFormer reach the blocks, whatever they are called."""

import logging

import pytest
import torch
from other_implementations import AuthorsBlock, AuthorsNCHW, Permuting, original
from torch import nn
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from bra_triton import BiLevelRoutingAttention
from bra_triton.yolo_integration import (
    BiFormerBlock,
    BiLevelRoutingAttention2d,
    NCHWBiLevelRoutingAttention2d,
)

SIZE = {"num_heads": 2, "n_win": 2, "topk": 3}
# Float32 rounds to 1 to 4e-7; another weight gives 1e-1 and more.
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
    """Built like the released models, whose names these are: `stages.1.0.mlp.3.weight`."""
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
    """All items are transferred; those of the attention were not, and nothing said so but their number."""
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
    for theirs, ours in zip(paste.parameters(), model.model[11].parameters(), strict=True):
        assert torch.equal(theirs, ours)
