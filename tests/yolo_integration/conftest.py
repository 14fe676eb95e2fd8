"""Fixtures: a small data set, a model trained on it, and commands in new processes."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_data import write_data


@contextlib.contextmanager
def quick_on_the_cpu() -> Iterator[None]:
    """Without Triton's interpreter, which takes minutes for a model; one thread is enough for small maps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TRITON_INTERPRET", raising=False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _quick_on_the_cpu() -> Iterator[None]:
    with quick_on_the_cpu():
        yield


@pytest.fixture(scope="session")
def data_yaml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four images with one box each."""
    return write_data(tmp_path_factory.mktemp("data"), "detect", images=4)


@pytest.fixture(scope="session")
def train_arguments(data_yaml: str) -> dict[str, object]:
    """Arguments of a short training; the caller adds `project`, `name` and `epochs`."""
    return {
        "data": data_yaml,
        "imgsz": 64,
        "batch": 4,
        "workers": 0,
        "device": "cpu",
        "optimizer": "SGD",
        "amp": False,
        "plots": False,
        "verbose": False,
        "pretrained": False,
        "exist_ok": True,
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, train_arguments: dict[str, object]) -> Path:
    """The weights folder of a short training: `best.pt`, and `epoch0.pt`, from which it can be resumed."""
    from ultralytics import YOLO

    import bra_triton.yolo_integration  # noqa: F401

    project = tmp_path_factory.mktemp("runs")
    with quick_on_the_cpu():
        model = YOLO("yolo26n-bra.yaml")
        model.train(**train_arguments, epochs=2, save_period=1, project=str(project), name="train")
    return project / "train" / "weights"


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens trainings by steps that take long and are the same for all models; `trained` includes them.

    Left out are the FLOP counts, and loading, stripping and validating the checkpoint after the last epoch.
    """
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.utils import torch_utils

    monkeypatch.setattr(BaseTrainer, "final_eval", lambda self: None)
    monkeypatch.setattr(torch_utils, "get_flops", lambda *args: 0.0)


@pytest.fixture
def fresh_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with the given arguments in a new process, in the test's temporary folder."""

    def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run
