"""`bra-bench`: every sub-command exists and receives its options; `large-map` and `host` run."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import bra_triton
from bra_triton.bench import command_line, large_map

COMMAND = [sys.executable, "-m", "bra_triton.bench.command_line"]


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_every_command_has_a_module_with_an_entry_point_and_says_its_name(capsys):
    for name, (module, _) in command_line.COMMANDS.items():
        if name == "demo":
            pytest.importorskip("ultralytics")
        main = importlib.import_module(f"bra_triton.bench.{module}").main
        assert inspect.signature(main).return_annotation is int
        with pytest.raises(SystemExit) as exit_status:
            command_line.main([name, "--help"])
        assert exit_status.value.code == 0
        assert f"usage: bra-bench {name}" in capsys.readouterr().out


def test_help_lists_the_commands_and_an_unknown_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in command_line.COMMANDS)
    with pytest.raises(SystemExit):
        command_line.main(["nonsense"])
    assert "'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["host", "peers", "models", "exports", "kernel-times"])
def test_numbers_go_to_a_file_in_a_folder_that_exists(name, tmp_path, capsys):
    """Else the command would fail after it has measured, and lose the numbers."""
    for given in ("nonesuch/numbers.json", str(tmp_path)):
        with pytest.raises(SystemExit):
            command_line.main([name, "--json", given])
        assert f"--json: must be a file in a folder that exists, got {given}" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"bra-triton {bra_triton.__version__}\n"


def test_help_imports_no_bench():
    """Optional packages, and Triton's compiler, are imported where they are used."""
    code = (
        "import sys, contextlib\n"
        "from bra_triton.bench import command_line\n"
        "with contextlib.suppress(SystemExit):\n    command_line.main(['--help'])\n"
        "print([m for m in sys.modules if m.startswith('bra_triton.bench.') or m == 'ultralytics'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['bra_triton.bench.command_line']"


def test_windows_without_triton_runs_what_needs_no_kernels():
    """`resource`, a module for Unix, and Triton are missing there."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('resource', 'triton'))\n"
        "from bra_triton.bench import command_line\n"
        "for name in ('peer_times', 'growth', 'models', 'exports', 'large_map', 'yolo_costs', 'check'):\n"
        "    command_line._module(name, name)\n"
        "command_line.main(['report'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("bra-bench report needs a package that is not installed: ")
    assert "triton" in message


def test_large_map_prints_time_and_peak_and_fails_past_the_limit(monkeypatch, capsys):
    """On a map small enough for a test."""
    small = replace(large_map.PROBLEMS["issue_21"], height=60, width=50)
    monkeypatch.setitem(large_map.PROBLEMS, "issue_21", small)
    monkeypatch.setattr(large_map, "LIMIT", 0.01)
    assert command_line.main(["large-map"]) == 1
    printed = capsys.readouterr().out
    assert "1 x 20 x 60 x 50" in printed
    assert "peak of the process" in printed
    assert "FAILED: more than 0.01 GiB" in printed
    monkeypatch.setattr(large_map, "LIMIT", 1000.0)
    assert command_line.main(["large-map"]) == 0
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.compiled
@pytest.mark.parametrize("flags", [[], ["--compiled"]])
def test_host_measures_without_a_gpu(flags, tmp_path):
    """In a separate process: a process has one Triton driver, and `host` replaces it by a stand-in."""
    file = tmp_path / "host.json"
    sizes = ["--form", "identity", "--phase", "no grad", "--repeats", "2"]
    done = run("host", *sizes, *flags, "--json", str(file))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["seconds"]) - {"einops"} == {"fused", "plain"}
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["launches"] == 2  # means, routing with attention
    assert row["operators"] > 0
    assert f"{row['launches']}" in done.stdout.splitlines()[-1]
