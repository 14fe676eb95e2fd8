"""The `bra-yolo` command in a new process, and exports of a trained model."""

import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import ultralytics
from ultralytics import YOLO

import bra_triton
from bra_triton.yolo_integration import command_line


def as_words(arguments: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in arguments.items()]


def test_command_trains_a_packaged_yaml_by_name(fresh_python, tmp_path: Path, train_arguments: dict) -> None:
    command = Path(sys.executable).with_name("bra-yolo")
    words = as_words({**train_arguments, "epochs": 1, "project": tmp_path, "name": "cli"})
    fresh_python(str(command), "train", "model=yolo26n-biformer.yaml", *words)
    assert (tmp_path / "cli" / "weights" / "best.pt").is_file()


def test_module_validates_a_checkpoint(fresh_python, trained: Path, data_yaml: str, tmp_path: Path) -> None:
    words = as_words({"model": trained / "best.pt", "data": data_yaml, "imgsz": 64, "batch": 3, "workers": 0})
    words += as_words({"device": "cpu", "plots": False, "project": tmp_path, "rect": True})
    process = fresh_python("-m", "bra_triton.yolo_integration.command_line", "val", *words)
    assert "mAP50-95" in process.stdout + process.stderr


def test_command_exports_a_checkpoint(fresh_python, trained: Path, tmp_path: Path) -> None:
    """Ultralytics' command line passes the model's name to `export`, too."""
    weights = shutil.copy(trained / "best.pt", tmp_path)  # the export is written beside the weights
    words = as_words({"model": weights, "format": "torchscript", "imgsz": 64, "device": "cpu"})
    fresh_python("-m", "bra_triton.yolo_integration.command_line", "export", *words)
    assert (tmp_path / "best.torchscript").is_file()


def test_wrong_arguments_fail_as_in_ultralytics(fresh_python) -> None:
    process = fresh_python("-m", "bra_triton.yolo_integration.command_line", "train", "modell=x", check=False)
    assert process.returncode != 0
    assert "modell" in process.stderr


def test_version_names_both_packages(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bra-yolo", "--version"])
    command_line.main()
    expected = f"bra-triton {bra_triton.__version__}, ultralytics {ultralytics.__version__}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("dynamic", "size"), [(False, 96), (True, 96), (True, 224)], ids=["static", "dynamic", "divisible"]
)
def test_onnx_export_computes_the_same(trained: Path, tmp_path: Path, dynamic: bool, size: int) -> None:
    """At 224 pixels the last map is 7 x 7 and needs no padding; the export must still pad other sizes."""
    checkpoint = shutil.copy(trained / "best.pt", tmp_path)
    model = YOLO(checkpoint)
    model.model.end2end = False  # else Ultralytics 8.4.140 sorts detections whose scores differ by rounding
    session = onnxruntime.InferenceSession(
        model.export(format="onnx", imgsz=size, dynamic=dynamic, simplify=False)
    )
    x = torch.rand(1, 3, 64, 128) if dynamic else torch.rand(1, 3, 96, 96)
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        expected = model.model.eval()(x)[0]
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_openvino_export_computes_the_same(trained: Path, tmp_path: Path, dynamic: bool) -> None:
    openvino = pytest.importorskip("openvino")
    model = YOLO(shutil.copy(trained / "best.pt", tmp_path))
    (file,) = Path(model.export(format="openvino", imgsz=96, dynamic=dynamic)).glob("*.xml")
    # In float32: on processors that have bfloat16, OpenVINO uses bfloat16 by default.
    run = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = torch.rand(1, 3, 64, 128) if dynamic else torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = model.model.eval()(x)[0]
    torch.testing.assert_close(torch.from_numpy(run(x.numpy())[0]), expected, atol=1e-4, rtol=1e-5)


def test_torchscript_export_computes_the_same(trained: Path, tmp_path: Path) -> None:
    model = YOLO(shutil.copy(trained / "best.pt", tmp_path))
    exported = torch.jit.load(model.export(format="torchscript", imgsz=96))
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model.model.eval()(x)[0], atol=1e-4, rtol=1e-5)
