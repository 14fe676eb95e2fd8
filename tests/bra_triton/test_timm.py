"""BiFormer in timm's registry. timm is a development dependency; users need not have it."""

import importlib
import logging
import pickle
import re
import sys

import pytest
import timm
import torch
from tiny_biformer import SIZE, TINY
from torch import nn

import bra_triton
from bra_triton import biformer
from bra_triton.biformer import BiFormer


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # interpreted, a model takes minutes


def test_timm_creates_the_models_and_hands_out_their_maps():
    assert timm.list_models("biformer*") == ["biformer_base", "biformer_small", "biformer_tiny"]
    assert timm.list_pretrained("biformer*") == []
    model = timm.create_model("biformer_tiny", **TINY).eval()
    nn.init.normal_(model.norm.running_mean)
    features = timm.create_model("biformer_tiny", features_only=True, out_indices=(1, 3), **TINY).eval()
    features.model.load_state_dict(model.state_dict())
    ours = BiFormer(**TINY).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    image = torch.rand(1, 3, *SIZE)
    torch.testing.assert_close(model(image), ours(image))
    maps = ours.stage_maps(image)
    torch.testing.assert_close(features(image), [maps[1], maps[3]])
    assert features.feature_info.channels() == [16, 24]
    assert features.feature_info.reduction() == [8, 32]
    final, (last,) = model.forward_intermediates(image, 1)
    torch.testing.assert_close((final, last), (ours.forward_features(image), maps[3]))
    assert model.pretrained_cfg["classifier"] == "head"
    with pytest.raises(ValueError, match="norm must be False and output_fmt 'NCHW', got True"):
        model.forward_intermediates(image, norm=True)
    with pytest.raises(ValueError, match="norm must be False and output_fmt 'NCHW', got False and 'NLC'"):
        model.forward_intermediates(image, output_fmt="NLC")


def test_timms_training_script_builds_and_groups_the_parameters():
    """The script always gives `drop_rate`; a learning rate of each layer needs `group_matcher`."""
    model = timm.create_model("biformer_tiny", **TINY, drop_rate=0.5)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert [names[0].rpartition(".")[0] for names in groups.values()] == [
        "downsample_layers.0.0",
        "stages.0.0.pos_embed",
        "downsample_layers.1.0",
        "stages.1.1.pos_embed",  # the second block of its stage; the first is grouped with the line above
        "downsample_layers.2.0",
        "downsample_layers.3.0",
        "head",
    ]
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert "stages.1.1.norm1.weight" in coarse[2]
    features = torch.ones(1, 24, 2, 3)
    assert set(model.train().forward_head(features, pre_logits=True).unique().tolist()) == {0, 2}
    assert model.eval().forward_head(features, pre_logits=True).eq(1).all()
    assert model.forward_head(features).shape == (1, 5)


def test_a_model_that_was_pickled_before_it_had_a_drop_rate_runs():
    model = timm.create_model("biformer_tiny", **TINY).eval()
    image = torch.rand(1, 3, *SIZE)
    expected = model(image)
    for name in ("drop_rate", "global_pool"):
        del vars(model)[name]
    assert torch.equal(pickle.loads(pickle.dumps(model))(image), expected)


def test_features_that_are_not_pooled_have_no_classifier():
    image = torch.rand(1, 3, *SIZE)
    model = timm.create_model("biformer_tiny", **{**TINY, "num_classes": 0}, global_pool="").eval()
    torch.testing.assert_close(model(image), model.forward_features(image))
    model.reset_classifier(3, "avg")
    assert model(image).shape == (1, 3)
    with pytest.raises(ValueError, match=r"num_classes must be 0 without pooling .*, got 3"):
        model.reset_classifier(3, "")
    with pytest.raises(ValueError, match=r"global_pool must be one of .*, got 'max'"):
        model.reset_classifier(0, "max")
    with pytest.raises(ValueError, match="drop_rate must be a number from 0 to under 1, got 1"):
        timm.create_model("biformer_tiny", **TINY, drop_rate=1)


@pytest.mark.parametrize("indices", [0, -1, 5, True, [4], [0, -5]])
def test_takes_only_stages_that_there_are(indices):
    model = timm.create_model("biformer_tiny", **TINY).eval()
    with pytest.raises(ValueError, match=rf"indices must be .*, got {re.escape(repr(indices))}"):
        model.forward_intermediates(torch.rand(1, 3, *SIZE), indices)


def test_does_not_promise_weights_that_it_cannot_load():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for biformer_tiny"):
        timm.create_model("biformer_tiny", pretrained=True, **TINY)


def test_timm_is_not_needed(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("bra_triton.biformer")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(bra_triton, "biformer", biformer)  # the import below replaces it
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with caplog.at_level(logging.INFO, logger="bra_triton"):
        assert importlib.import_module("bra_triton.biformer").BiFormer is not BiFormer
    assert "BiFormer is not registered with timm" in caplog.text
    assert "bra_triton.biformer.timm_models" not in sys.modules
