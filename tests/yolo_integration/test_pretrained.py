"""Weights of stock models load into every row that both models have, whatever its number."""

import logging

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.nn.modules.conv import Conv
from ultralytics.utils import LOGGER

from bra_triton.yolo_integration import BiFormerBlock, pretrained, set_backend
from bra_triton.yolo_integration.pretrained import match_rows

A, B, C = ({name: torch.Size([size])} for name, size in (("a", 1), ("b", 1), ("a", 2)))


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ([A, B, C], [A, B, C], [0, 1, 2]),
        ([A, A, B], [A, C, A, B], [0, None, 1, 2]),  # a row more
        ([A, C, B], [A, B], [0, 2]),  # a row less
        ([A, A | B], [A, A | B, C], [0, 1, None]),  # the row with more equal tensors counts
        ([A, {}, A], [A, A], [0, 2]),  # rows without tensors
        ([A, B, A], [A, C, A], [0, 1, 2]),  # by position: another implementation's names
        ([B], [A, C], [None, None]),
        ([], [A], [None]),
    ],
)
def test_rows_are_matched_in_order_by_the_tensors_that_agree(source, target, expected) -> None:
    assert match_rows(source, target) == expected


def test_rows_are_moved_in_a_copy_of_the_source() -> None:
    row = nn.Linear(1, 2)
    source = nn.ModuleDict({"model": nn.Sequential(row), "other": nn.Linear(1, 1)})
    moved = pretrained.with_rows_of(source, nn.ModuleDict({"model": nn.Sequential(nn.Linear(1, 1), row)}))
    assert [*moved.state_dict()] == ["model.1.weight", "model.1.bias", "other.weight", "other.bias"]
    assert [*source.state_dict()] == ["model.0.weight", "model.0.bias", "other.weight", "other.bias"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stock checkpoint whose tensors are all 3."""
    model = YOLO("yolo26n.yaml", verbose=False)
    for value in model.model.state_dict().values():
        value.fill_(3)
    path = str(tmp_path_factory.mktemp("stock") / "yolo26n.pt")
    model.save(path)
    return path


def _check_transfer(model: torch.nn.Module, log: str) -> None:
    """12 of 702 tensors keep their initial values: weight and bias of six layers in two attention modules."""
    new = [name for name, value in model.state_dict().items() if not (value == 3).all()]
    assert len(new) == 12
    assert all(".attn." in name for name in new)
    assert "Transferred 690/702 items" in log
    assert "12 tensors have no counterpart in the weights" in log
    assert "keep their initial values: model.10.m.0.attn.attn.lepe, " in log


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_load_transfers_a_stock_checkpoint_by_structure(stock: str, log) -> None:
    model = YOLO("yolo26n-bra.yaml", verbose=False).load(stock)
    _check_transfer(model.model, log.text)
    log.clear()
    YOLO("yolo26n-bra.yaml", verbose=False).load(model.model)
    assert "Transferred 702/702" in log.text
    assert "keep their initial values" not in log.text


def test_training_starts_from_a_stock_checkpoint_by_structure(
    stock: str, log, train_arguments, tmp_path
) -> None:
    overrides = {
        **train_arguments,
        "model": "yolo26n-bra.yaml",
        "pretrained": stock,
        "project": str(tmp_path),
    }
    trainer = DetectionTrainer(overrides={**overrides, "epochs": 1})
    trainer.data["nc"] = 80  # as in the checkpoint, so that heads agree
    trainer.setup_model()
    _check_transfer(trainer.model, log.text)


def test_a_stock_model_loads_as_before(stock: str, log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pretrained, "with_rows_of")
    YOLO("yolo26n.yaml", verbose=False).load(stock)
    assert "Transferred 708/708" in log.text
    assert "keep their initial values" not in log.text


def test_a_source_without_rows_is_left_to_ultralytics(log) -> None:
    tasks.DetectionModel("yolo26n-bra.yaml", verbose=False).load(torch.nn.Linear(1, 1))
    assert "Transferred 0/702" in log.text


@pytest.mark.parametrize("entry", ["ema", "model"])  # a finished training's checkpoint has only the first
def test_a_checkpoint_is_loaded_by_structure_and_without_messages_if_asked_for(entry: str, log) -> None:
    source = tasks.DetectionModel("yolo26n.yaml", verbose=False)
    model = tasks.DetectionModel("yolo26n-bra.yaml", verbose=False)
    log.clear()
    model.load({"ema": None, "model": None, entry: source}, verbose=False)
    assert torch.equal(model.model[14].cv1.conv.weight, source.model[13].cv1.conv.weight)
    assert log.text == ""


@pytest.mark.parametrize("names", [{0: "class 7", 1: "class 3"}, {0: "a", 1: "b"}])
def test_what_is_loaded_in_part_is_not_said_to_keep_its_initial_values(names: dict[int, str], log) -> None:
    """Ultralytics loads the common channels of the first convolution, and classes by their names.

    With more than 64 classes the head is wider, and Ultralytics 8.4.140 loads less of it for two classes.
    """
    source = tasks.DetectionModel("yolo26n.yaml", nc=64, verbose=False)
    source.names = {index: f"class {index}" for index in range(64)}
    model = tasks.DetectionModel("yolo26n-bra.yaml", ch=4, nc=2, verbose=False)
    model.names = names
    model.load(source)
    loads_classes = "class 7" in names.values()
    assert ("Remapped 2/2" in log.text) == loads_classes
    assert f"Transferred {690 if loads_classes else 678}/702 items" in log.text
    assert f"{12 if loads_classes else 24} tensors have no counterpart in the weights" in log.text
    assert "initial values: model.10.m.0.attn.attn.lepe, " in log.text
    assert ("model.24.cv3.0.2" in log.text) != loads_classes


def test_nothing_of_another_width_or_kernel_is_loaded(log) -> None:
    """Of all 12 tensors only the two counters of batches have the same shapes."""
    source, target = (
        nn.ModuleDict({"model": nn.ModuleList([Conv(3, width, kernel), Conv(width, width)])})
        for width, kernel in ((8, 3), (16, 5))
    )
    pretrained.report(source, target)
    assert "10 tensors have no counterpart in the weights" in log.text


def test_settings_that_training_drops_are_warned_of(log, train_arguments, tmp_path) -> None:
    model = YOLO("yolo26n-bra.yaml", verbose=False)
    last = model.model.model[11].attn
    set_backend(model, "reference")
    last.topk, last.n_win, last.auto_pad = 8, 4, False
    model.save(tmp_path / "set.pt")
    overrides = {**train_arguments, "model": str(tmp_path / "set.pt"), "pretrained": True, "epochs": 1}
    DetectionTrainer(overrides={**overrides, "project": str(tmp_path)}).setup_model()
    (warning,) = (record.getMessage() for record in log.records if record.levelname == "WARNING")
    for change in (
        "backend='auto', not 'reference' (model.10.m.0.attn.attn, model.11.attn)",
        "n_win=5, not 4 (model.11.attn)",
        "topk=4, not 8 (model.11.attn)",
        "auto_pad=True, not False (model.11.attn)",
    ):
        assert change in warning
    assert "scale" not in warning


def test_settings_of_a_model_that_was_built_from_a_yaml_are_warned_of(log, train_arguments, tmp_path) -> None:
    """Without the data set, training ends before it builds the model anew."""
    arguments = {**train_arguments, "data": "nonesuch.yaml", "project": str(tmp_path)}
    model = YOLO("yolo26n-bra.yaml", verbose=False)
    with pytest.raises(RuntimeError, match=r"nonesuch\.yaml"):
        model.train(**arguments)
    assert "WARNING" not in log.text
    model.model.model[11].attn.topk = 8
    set_backend(model, "torch")
    with pytest.raises(RuntimeError, match=r"nonesuch\.yaml"):
        model.train(**arguments)
    (warning,) = (record.getMessage() for record in log.records if record.levelname == "WARNING")
    assert "topk=4, not 8 (model.11.attn)" in warning
    assert "backend='auto', not 'torch' (model.10.m.0.attn.attn, model.11.attn)" in warning
    model.ckpt = {"epoch": -1}  # as after `load`; then the transfer of weights warns
    log.clear()
    with pytest.raises(RuntimeError, match=r"nonesuch\.yaml"):
        model.train(**arguments)
    assert "WARNING" not in log.text


def test_settings_that_stay_or_whose_weights_do_not_fit_are_not_warned_of(log) -> None:
    source = tasks.DetectionModel("yolo26n-bra.yaml", verbose=False)
    tasks.DetectionModel("yolo26n-bra.yaml", verbose=False).load(source)
    pretrained.report_settings(BiFormerBlock(64), BiFormerBlock(32))  # 2 heads and 1
    assert "Transferred" in log.text
    assert "WARNING" not in log.text
