"""Registration: what it changes in Ultralytics and what not; loading a checkpoint registers the blocks."""

import functools
import importlib
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import ultralytics
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.utils import callbacks, dist

import bra_triton.yolo_integration
from bra_triton import NCHWBiLevelRoutingAttention
from bra_triton.yolo_integration import (
    BiLevelRoutingAttention2d,
    NCHWBiLevelRoutingAttention2d,
    register,
    registration,
)

STOCK_BEFORE_AND_AFTER = """
import torch
from ultralytics import YOLO

def build():
    torch.manual_seed(0)
    return YOLO("yolo26n.yaml").model.state_dict()

before = build()
import bra_triton.yolo_integration
after = build()
assert list(before) == list(after) and len(before) > 500
assert all(torch.equal(before[key], after[key]) for key in before)
"""

PREDICT = """
import sys, numpy as np
from ultralytics import YOLO
assert not any(name.startswith("bra_triton") for name in sys.modules)
{before}
model = YOLO({checkpoint!r})
assert "bra_triton.yolo_integration" in sys.modules
model.predict(np.zeros((64, 96, 3), dtype=np.uint8), imgsz=96, verbose=False)
print("predicted")
"""

# After a prediction: only loading a checkpoint has registered the package.
EXPORT = """
try:
    model.export(format="ncnn")
except ValueError as error:
    print(error)
"""

# In one process, because importing Ultralytics takes seconds.
RESTRICTED = """
import traceback
try:
    YOLO({checkpoint!r})
except TypeError:  # Ultralytics turns the error of `torch.load` into this one
    print("refused:", repr(traceback.format_exc()))
assert not any(name.startswith("bra_triton") for name in sys.modules)
import bra_triton.yolo_integration
"""

TRAIN = """
arguments = {arguments!r}
YOLO({checkpoint!r}).train(**arguments, epochs=1, project={project!r}, name="tuned")
print("tuned")
YOLO({resumable!r}).train(resume=True)
print("resumed")
"""


def test_stock_model_is_the_same_before_and_after(fresh_python) -> None:
    fresh_python("-c", STOCK_BEFORE_AND_AFTER)


def test_second_call_changes_nothing() -> None:
    before = {**vars(tasks)}, [*callbacks.default_callbacks["on_pretrain_routine_start"]]
    register()
    assert before == ({**vars(tasks)}, callbacks.default_callbacks["on_pretrain_routine_start"])
    assert not hasattr(tasks.parse_model._bra_triton_wraps, "_bra_triton_wraps")


def test_a_module_of_the_users_own_is_not_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(registration.LOGGER, "warning", warnings.append)
    register()
    assert warnings == []
    monkeypatch.setattr(tasks, "C2BRA", torch.nn.Identity)
    register()
    assert tasks.C2BRA is bra_triton.yolo_integration.C2BRA
    (warning,) = warnings
    ours, theirs = "bra_triton.yolo_integration.modules.C2BRA", "torch.nn.modules.linear.Identity"
    assert f"rows named C2BRA build <class '{ours}'> from now on, no longer <class '{theirs}'>" in warning


@pytest.mark.parametrize("place", [tasks, ultralytics.nn])  # the package has a name of its own for it
def test_wrappers_keep_the_name_and_documentation_of_what_they_wrap(place: ModuleType) -> None:
    assert place.parse_model.__name__ == "parse_model"
    assert place.parse_model.__doc__ == place.parse_model._bra_triton_wraps.__doc__


def test_only_one_thread_at_a_time_builds_a_model() -> None:
    """While a model with `C2BRA` is built, names of Ultralytics' classes stand for this package's blocks."""
    inside: list[int] = []
    found: list[int] = []

    def original(_: dict) -> tuple[torch.nn.Module, list]:
        inside.append(1)
        time.sleep(0.02)  # long enough for the other threads to come here, if they could
        found.append(len(inside))
        inside.pop()
        return torch.nn.Sequential(), []

    model = {"backbone": [[-1, 1, "C2BRA", [64]]], "head": []}
    with ThreadPoolExecutor() as pool:
        parse = functools.partial(registration._parse_with_expanded_rows, original)
        assert len([*pool.map(parse, [model] * 3)]) == 3
    assert found == [1, 1, 1]


def test_a_path_that_does_not_exist_is_not_a_packaged_yaml() -> None:
    with pytest.raises(FileNotFoundError):
        tasks.check_yaml("./yolo26-bra.yaml")


def test_tensors_under_other_names_are_selected_and_those_given_not_changed() -> None:
    given = {"model.11.lepe.weight": torch.zeros(1)}
    own = {"model.11.attn.lepe.weight": torch.ones(1)}
    assert tasks.intersect_dicts(given, own) == {"model.11.attn.lepe.weight": torch.zeros(1)}
    assert tasks.intersect_dicts(given, own, exclude=["lepe"]) == {}
    assert [*given] == ["model.11.lepe.weight"]


def test_fresh_process_predicts_refuses_tunes_and_resumes_from_a_checkpoint_alone(
    fresh_python, trained: Path, tmp_path: Path, train_arguments: dict
) -> None:
    checkpoint = str(trained / "best.pt")
    trains = TRAIN.format(
        arguments=train_arguments,
        checkpoint=checkpoint,
        project=str(tmp_path),
        resumable=str(trained / "epoch0.pt"),
    )
    output = fresh_python("-c", PREDICT.format(before="", checkpoint=checkpoint) + EXPORT + trains).stdout
    words = ("predicted", "format='ncnn' cannot hold", "tuned", "resumed")
    assert [word for word in words if word not in output] == []
    assert (tmp_path / "tuned" / "weights" / "best.pt").is_file()


def test_restricted_loading_admits_the_blocks_only_once_the_package_is_imported(
    fresh_python, trained: Path
) -> None:
    checkpoint = str(trained / "best.pt")
    script = PREDICT.format(before=RESTRICTED.format(checkpoint=checkpoint), checkpoint=checkpoint)
    output = fresh_python("-c", script, ULTRALYTICS_SAFE_LOAD="1").stdout
    assert re.search(r"refused: .*bra_triton", output)
    assert "predicted" in output


def test_child_process_of_multi_gpu_training_knows_the_yaml_by_name(
    fresh_python, tmp_path: Path, train_arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Runs the file that Ultralytics generates for its child processes, once, on the CPU.
    monkeypatch.setitem(sys.modules, "cloudpickle", pickle)
    monkeypatch.setattr("ultralytics.utils.checks.check_requirements", lambda *_args, **_kwargs: True)
    monkeypatch.setattr(dist, "USER_CONFIG_DIR", tmp_path)
    overrides = {**train_arguments, "model": "yolo26n-bra.yaml", "epochs": 1, "project": str(tmp_path)}
    trainer = DetectionTrainer(overrides={**overrides, "name": "child"})
    assert isinstance(trainer.model, str)
    trainer.callbacks = callbacks.get_default_callbacks()  # without lambdas, which pickle refuses
    fresh_python(dist.generate_ddp_file(trainer))
    assert (tmp_path / "child" / "weights" / "best.pt").is_file()


def test_a_format_that_cannot_hold_the_attention_is_refused_before_the_export() -> None:
    exporter = SimpleNamespace(args=SimpleNamespace(format="ncnn"), model=BiLevelRoutingAttention2d(8))
    assert registration.refuse_export in callbacks.default_callbacks["on_export_start"]
    with pytest.raises(ValueError, match=r"NCNN has no operator.*; use 'onnx', 'openvino'"):
        registration.refuse_export(exporter)
    registration.refuse_export(SimpleNamespace(args=SimpleNamespace(format="onnx"), model=exporter.model))
    exporter.model = torch.nn.Conv2d(1, 1, 1)
    registration.refuse_export(exporter)


def test_only_classes_of_this_package_are_allowed_in_checkpoints() -> None:
    allowed = {kind.__module__.partition(".")[0] for kind in registration._package_classes()}
    assert allowed == {"bra_triton"}


def test_without_ultralytics_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Ultralytics: pip install 'ultralytics>="):
        importlib.reload(bra_triton.yolo_integration)


def test_every_class_in_a_checkpoint_is_allowed(trained: Path) -> None:
    needed = torch.serialization.get_unsafe_globals_in_checkpoint(str(trained / "best.pt"))
    assert [name for name in needed if name.startswith("bra_triton")] == []
    assert {BiLevelRoutingAttention2d, NCHWBiLevelRoutingAttention2d, NCHWBiLevelRoutingAttention} <= set(
        registration._package_classes()
    )
