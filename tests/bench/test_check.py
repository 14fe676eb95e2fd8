"""The one command: runs from a bare working tree, reports failures and goes on, and keeps to its budget."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from typecheck import package_folders

from bra_triton.bench import check, jobs, measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bare_tree(tmp_path_factory):
    """A copy of the working tree where nothing was installed from."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("bra_triton", "kernels", "bench", "yolo_integration"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "photos"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_an_installation_without_tests_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        check.main(["--device", "cpu"])
    assert "it runs the tests of a working tree" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_package_of_the_tree_is_found():
    """An installation would leave out a folder that pyproject.toml does not name, as would a bare tree."""
    folders = package_folders(ROOT)
    tops = {folder.split("/")[0] for folder in folders.values()}
    found = {str(p.parent.relative_to(ROOT)) for top in tops for p in (ROOT / top).rglob("__init__.py")}
    assert set(folders.values()) == found
    assert tops == {"bra_triton", "kernels", "bench", "yolo_integration"}
    settings = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == set(folders)
    for name, folder in folders.items():  # where `in_tree` finds them
        inside = name.removeprefix("bra_triton").lstrip(".").replace(".", "/")
        assert folder in {inside, f"bra_triton/{inside}".rstrip("/")}


def test_a_bare_tree_is_imported_from_itself_and_needs_no_optional_package(bare_tree):
    (bare_tree / "probe.py").write_text(
        textwrap.dedent("""
        import json, sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("ultralytics", "hypothesis", "matplotlib"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        import bra_triton.bench.peer_times, bra_triton.bench.check
        import bra_triton.kernels.attention.launch
        names = ("bra_triton", "bra_triton.bench", "bra_triton.kernels.lepe", "bra_triton.bench.measure")
        print(json.dumps([sys.modules[n].__file__ for n in names] + sys.argv))
        """)
    )
    # Outside the tree, and without the user's site: an installed copy must not be needed, nor be taken.
    command = [sys.executable, "-s", str(bare_tree / "bench" / "in_tree.py"), "probe", "--flag"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bare_tree.parent, check=True)
    *files, name, flag = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(bare_tree) for file in files)
    assert (name, flag) == ("probe", "--flag")


def test_processes_that_it_spawns_find_the_tree_too(bare_tree):
    (bare_tree / "spawning.py").write_text(
        textwrap.dedent("""
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from bra_triton.kernels import tiles
        if __name__ == "__main__":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(tiles.__file__, pool.submit(tiles.channel_block, 20).result())
        """)
    )
    command = [sys.executable, "-s", str(bare_tree / "bench" / "in_tree.py"), "spawning"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bare_tree.parent, check=True)
    assert done.stdout.split() == [str(bare_tree / "kernels" / "tiles" / "__init__.py"), "32"]


def test_it_asks_for_a_gpu_from_a_bare_tree(bare_tree):
    """`make gpu-check`, with nothing on the path but the standard library and PyTorch."""
    command = [sys.executable, "bench/in_tree.py", "bra_triton.bench.command_line", "check"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=bare_tree, env=environment, check=False
    )
    assert done.returncode == 2
    assert "--device cpu rehearses" in done.stderr


def test_a_copy_without_git_says_what_it_is_of(monkeypatch):
    monkeypatch.setenv("BRA_TRITON_COMMIT", "abc1234")
    assert measure.circumstances(torch.device("cpu"))["commit"] == "abc1234"


def test_the_files_that_start_first_are_there():
    stems = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(check.LONGEST_FILES) <= stems


def test_the_modes_are_those_by_which_tests_are_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    tests = (ROOT / "tests" / "gpu" / "test_modes.py").read_text()
    assert {"identity", "auto_pad_soft_diff", "nchw"} <= set(check.all_modes())
    assert 'id=f"{mode.name}-{name}"' in tests


def test_files_are_left_out_by_what_they_import(tmp_path):
    test = tmp_path / "test_x.py"
    test.write_text(
        "import torch, json\nfrom problems import CASES\ndef f():\n    import no_such_package.sub\n"
    )
    assert check.missing_imports(test) == ["no_such_package"]


class TestRun:
    """The command itself, with tests in the place of the modes' that take no time."""

    MODES = """
        import pytest
        @pytest.mark.parametrize("name", ["good-fp32", "good-fp16", "bad-fp32", "bad-bf16"])
        def test_mode(name):
            assert name != "bad-bf16", "wrong by\\na lot"
        @pytest.mark.parametrize("name", ["good-fp32", "dead-fp32"])
        def test_other(name):
            if name == "dead-fp32":
                import os
                os._exit(3)
    """

    @pytest.fixture
    def run(self, tmp_path, capsys):
        tests = tmp_path / "test_modes.py"
        tests.write_text(textwrap.dedent(self.MODES))

        def run(*flags):
            common = ["--device", "cpu", "--out", str(tmp_path / "out"), "--tests", str(tests)]
            status = check.main([*common, *flags])
            capsys.readouterr()
            results = json.loads((tmp_path / "out" / "results.json").read_text())
            return status, results, (tmp_path / "out" / "report.md").read_text()

        return run

    def test_a_failing_mode_gives_status_1_and_the_rest_runs(self, run):
        status, results, report = run("--parts", "modes", "--modes", "good", "bad", "dead", "--workers", "2")
        assert status == 1
        checks = {one["name"]: one for one in results["checks"]}
        assert {name: one["status"] for name, one in checks.items()} == {
            "mode good": jobs.PASSED,
            "mode bad": jobs.FAILED,
            "mode dead": jobs.FAILED,
        }
        (failure,) = checks["mode bad"]["failures"]
        assert "::test_mode[bad-bf16] - AssertionError: wrong by" in failure
        assert "exit status 3" in checks["mode dead"]["failures"][0]
        assert "1 of 3 checks passed." in report
        assert re.search(r"\| mode bad +\| failed +\| 1 failed, 1 passed, 4 deselected in", report)
        assert re.search(r"\| mode good +\| passed +\| 3 passed, 3 deselected in", report)
        assert "- mode bad: `FAILED " in report

    def test_only_the_modes_asked_for(self, run):
        status, results, _ = run("--parts", "modes", "--modes", "good")
        assert status == 0
        assert [one["name"] for one in results["checks"]] == ["mode good"]

    def test_no_tests_at_all_is_a_failure(self, run):
        status, _, report = run("--parts", "modes", "--modes", "misspelt")
        assert status == 1
        assert "| mode misspelt | failed | 6 deselected in" in report

    def test_spent_budget_skips_rows_and_says_so(self, run):
        status, results, report = run(
            *(
                "--parts",
                "benchmark",
                "--budget-seconds",
                "0.01",
                "--rows",
                "tiny:1:float32",
                "tiny:2:float32",
            )
        )
        assert status == 0
        assert results["rows"] == []
        for row in ("tiny:1:float32", "tiny:2:float32"):
            assert f"- row {row} was not finished: the budget of 0 s was spent" in report

    def test_a_row_that_was_timed_is_in_the_report_and_one_that_failed_is_a_failure(self, run, monkeypatch):
        def run_all(planned, workers, deadline, cwd, environment):
            """In the place of processes: the first row is timed, the second fails."""
            for job, status in zip(planned, (jobs.PASSED, jobs.FAILED), strict=False):  # or none, of checks
                folder = Path(job.command[job.command.index("--out") + 1])
                folder.mkdir(exist_ok=True)
                row = {"problem": "tiny", "sizes": "", "dtype": "float32", "versions": {}, "peers": {}}
                if status == jobs.PASSED:
                    (folder / "tiny-batch1-float32.json").write_text(json.dumps(row))
                yield jobs.Outcome(
                    job.name, status, 1.0, failures=["FAILED: it"] if status == jobs.FAILED else []
                )

        monkeypatch.setattr(jobs, "run_all", run_all)
        status, results, report = run("--parts", "benchmark", "--rows", "tiny:1:float32", "tiny:2:float32")
        assert status == 1
        assert [row["problem"] for row in results["rows"]] == ["tiny"]
        assert "- row tiny:2:float32: `FAILED: it`" in report

    def test_checks_cut_off_by_the_budget_fail(self, run):
        """A check that did not finish has shown nothing."""
        status, results, _ = run("--parts", "modes", "peers", "--budget-seconds", "0.01")
        assert status == 1
        assert {one["status"] for one in results["checks"]} <= {jobs.NOT_FINISHED, jobs.FAILED}

    def test_gpu_is_demanded_unless_a_rehearsal_is_asked_for(self, monkeypatch, capsys):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit):
            check.main([])
        assert "--device cpu rehearses" in capsys.readouterr().err


def test_a_job_that_hangs_is_ended_with_what_it_started(tmp_path):
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    job = jobs.Job("hang", [sys.executable, "-c", script], tmp_path / "log")
    start = time.monotonic()
    outcome = jobs.run_one(job, start + 1.5, tmp_path, {})
    assert time.monotonic() - start < 20
    assert outcome.status == jobs.NOT_FINISHED


@pytest.mark.parametrize(("passes", "status"), [((0,), jobs.FAILED), ((0, 5), jobs.PASSED)])
def test_a_file_of_which_no_test_runs_here_is_no_failure(passes, status, tmp_path):
    """As pytest ends where all tests are deselected; of a mode that is a failure, see above."""
    command = [sys.executable, "-c", "print('1 deselected'); raise SystemExit(5)"]
    outcome = jobs.run_one(
        jobs.Job("none", command, tmp_path / "log", passes), time.monotonic() + 60, tmp_path, {}
    )
    assert (outcome.status, outcome.says) == (status, "1 deselected")


def test_the_plan_begins_with_the_longest_files_and_names_those_left_out(tmp_path, monkeypatch):
    missing = check.missing_imports
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(
        check, "missing_imports", lambda path: ["pack"] if path.stem == "test_lepe" else missing(path)
    )
    options = check._parse(["--device", "cpu", "--parts", "suite", "peers", "modes"])
    notes = []
    planned = check._plan(options, tmp_path, notes)
    longest = [f"file {name}" for name in check.LONGEST_FILES]
    peers = [f"peers {row}" for row in check.ROWS_ON_CPU]
    assert [job.name for job in planned[: len(longest) + len(peers)]] == longest + peers
    jobs_by_name = {job.name: job for job in planned}
    assert {"file test_routing", "file test_nhwc", "mode identity"} <= jobs_by_name.keys()
    assert check.NO_TESTS in jobs_by_name["mode identity"].passes  # on a GPU, every mode has tests
    options.device = "cuda"
    planned = {job.name: job for job in check._plan(options, tmp_path, [])}
    assert planned["mode identity"].passes == (0,)
    assert "tests/kernels/test_lepe.py was not run: no pack here" in notes


def test_report_of_nothing():
    results = {"versions": {"card": None, "torch": "2"}, "checks": [], "rows": [], "notes": ["a note"]}
    report = check.markdown(results)
    assert "- a note" in report
    assert "card" not in report
