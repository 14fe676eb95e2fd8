"""Runs what the documentation shows: Python blocks, examples in docstrings, example scripts, tables."""

import doctest
import inspect
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import seed_module
import torch
from torch import nn
from ultralytics import YOLO

import bra_triton
from bra_triton import biformer, functional, visualize, yolo_integration
from bra_triton.bench import yolo_costs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES_WITH_BLOCKS = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (bra_triton, bra_triton.__all__),
        (biformer, biformer.__all__),
        (functional, ["bi_level_routing_attention", "region_routing", "regional_routing_attention"]),
        (visualize, ["attention_figure", "attention_page", "record"]),
        (yolo_integration, yolo_integration.__all__),
    )
    for name in names
    if callable(getattr(module, name))
}


@pytest.fixture
def tiny_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_yaml: str, short_training: None
) -> None:
    """Every training takes one epoch on images of 64 pixels, and writes to the test's temporary folder."""
    train = YOLO.train
    small = {"epochs": 1, "imgsz": 64, "batch": 4, "workers": 0, "plots": False, "project": str(tmp_path)}

    def train_briefly(self: YOLO, **arguments: Any) -> Any:
        given = arguments["data"]
        return train(self, **{**arguments, **small, "data": given if Path(given).is_file() else data_yaml})

    monkeypatch.setattr(YOLO, "train", train_briefly)


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, ids=lambda page: page.stem)
@pytest.mark.usefixtures("tiny_training")
def test_python_blocks_run_in_their_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Pages use `model` without defining it: a model that somebody else wrote.
    names = {"__name__": page.stem, "model": nn.Sequential(seed_module.BiLevelRoutingAttention(32))}
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[1], page.name, "exec"), names)
    assert "not replaced: 1" not in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_symbol_has_examples_that_are_true(name: str) -> None:
    symbol = PUBLIC[name]
    given = {**vars(inspect.getmodule(symbol)), "torch": torch, "nn": nn}
    # The example of `replace_attention` uses `biformer`, somebody's Python module with the original class.
    original = type(
        "BiLevelRoutingAttention", (seed_module.BiLevelRoutingAttention,), {"__module__": "biformer"}
    )
    given["biformer"] = SimpleNamespace(BiLevelRoutingAttention=original)
    (test,) = doctest.DocTestFinder(recurse=False).find(symbol, name, globs=given)
    assert test.examples, f"{name} shows no example"
    results = doctest.DocTestRunner().run(test)
    assert results.failed == 0


@pytest.fixture
def run_example(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a script of docs/examples as the main program, in a temporary folder; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "docs" / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_script_is_run_here() -> None:
    ran = set(re.findall(r'run_example\("(\w+\.py)"', Path(__file__).read_text()))
    assert ran == {file.name for file in (ROOT / "docs" / "examples").glob("*.py")}


def test_example_of_drop_in_training_learns(run_example: Callable[..., str]) -> None:
    printed = run_example("drop_in_training.py", "--steps", "60")
    # A model that always answers "other colours" is right in two of three cases.
    assert float(re.search(r"right on 500 new images: ([\d.]+)%", printed)[1]) > 95  # type: ignore[index]


def test_example_of_replacing_attention_keeps_the_outputs(run_example: Callable[..., str]) -> None:
    printed = run_example("replace_in_a_model.py")
    assert "replaced: 2\n" in printed
    difference = float(re.search(r"largest difference of the outputs: (\S+)", printed)[1])  # type: ignore[index]
    assert 0 < difference < 1e-5  # float32's rounding of outputs around 1; 0 would mean the same modules


@pytest.mark.usefixtures("tiny_training")
def test_example_of_yolo_training_exports_a_model(run_example: Callable[..., str]) -> None:
    printed = run_example("yolo_training.py", "--imgsz", "64")
    assert "objects found in 8 photographs" in printed
    assert Path(re.search(r"^exported: (.*)$", printed, re.MULTILINE)[1]).is_file()  # type: ignore[index]


def test_tables_of_the_yolo_guide_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(yolo_costs, "SUFFIXES", ("-cls",))  # the others take seconds
    assert yolo_costs.main([]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert any("`yolo26n-bra-cls.yaml`" in line for line in printed)
    guide = (ROOT / "docs" / "yolo_guide.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in guide] == []


@pytest.mark.parametrize("size", ["0", "100"])
def test_sizes_that_no_model_takes_are_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        yolo_costs.main(["--imgsz", size])
    assert f"--imgsz must be a multiple of 32 of at least 64, got {size}" in capsys.readouterr().err
