"""Checkpoints of other people's models, whose parameters have other names."""

import pytest
import torch
from other_implementations import original
from problems import relative_error
from torch import nn

from bra_triton import BiLevelRoutingAttention
from bra_triton.checkpoint_keys import take_names

SIZE = {"dim": 12, "num_heads": 2, "n_win": 2, "topk": 3}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.11.lepe.weight", "model.11.attn.lepe.weight"),
        ("model.11.qkv.qkv.bias", "model.11.attn.qkv.qkv.bias"),
        ("model.11.qkv.weight", "model.11.attn.qkv.qkv.weight"),
        ("wo.weight", "attn.wo.weight"),
        ("4.router.emb.bias", "4.attn.router.emb.bias"),
        ("4.output_linear.weight", "4.attn.output_linear.weight"),
        ("model.10.m.0.attn.lepe.bias", "model.10.m.0.attn.attn.lepe.bias"),
        ("qkv.weight", "qkv.qkv.weight"),
    ],
)
def test_names_of_an_attention(theirs, ours):
    state = {theirs: 1, "other": 2}
    take_names(state, [ours, "more"])
    assert state == {ours: 1, "other": 2}


def test_names_of_a_block():
    names = [f"stages.2.3.{name}" for name in ("mlp.0.weight", "mlp.2.weight", "attn.qkv.qkv.weight")]
    state = {name.replace("mlp.2", "mlp.3"): name for name in names}
    take_names(state, names)
    assert state == {name: name for name in names}


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"lepe.weight": 1, "attn.lepe.weight": 2}, ["attn.lepe.weight"]),  # our name is there already
        ({"lepe.weight": 1}, ["attn.lepe.weight", "lepe.weight"]),  # we have a parameter of their name, too
        ({"0.mlp.3.weight": 1}, ["0.mlp.2.weight"]),  # some other model's MLP
        ({"proj.weight": 1}, ["attn.proj.weight"]),  # some other attention's layer
    ],
)
def test_what_is_not_renamed(state, names):
    before = dict(state)
    take_names(state, names)
    assert state == before


def test_a_projection_that_is_one_layer():
    theirs, ours = original(**SIZE), BiLevelRoutingAttention(**SIZE, backend="torch")
    state = {name.replace("qkv.qkv", "qkv"): value for name, value in theirs.state_dict().items()}
    keys = list(state)
    nn.Sequential(ours).load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=True)
    assert list(state) == keys
    x = torch.randn(1, 4, 6, 12)
    assert relative_error(ours(x), theirs(x).double()) < 1e-5


def test_what_is_missing_is_still_an_error():
    state = original(**SIZE).state_dict()
    state["gamma"] = state.pop("lepe.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*lepe.weight.*Unexpected.*gamma"):
        BiLevelRoutingAttention(**SIZE).load_state_dict(state)
