"""The version is written once, in the package; an installation and the changelog agree with it."""

import ast
import re
from pathlib import Path

import pytest

import bra_triton

ROOT = Path(__file__).resolve().parents[1]


def test_setuptools_can_read_the_version_without_importing_the_package():
    tree = ast.parse((ROOT / "bra_triton" / "__init__.py").read_text(encoding="utf-8"))
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(assigned["__version__"]) == bra_triton.__version__
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "bra_triton.__version__"}}


def test_the_newest_release_in_the_changelog_is_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", name) for name in sections[1:]]
    assert sections[0] == "[Unreleased]"
    assert all(releases)
    assert releases[0][1] == bra_triton.__version__
    assert [match[2] for match in releases] == sorted((match[2] for match in releases), reverse=True)
