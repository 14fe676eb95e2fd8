"""`bra-bench check` needs no installation, reports failures and continues, and keeps to its time budget."""

import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typecheck import package_folders

from bra_triton.bench import autotune, check, command_line, jobs, kernel_report, measure

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bare_tree(tmp_path_factory):
    """A copy of the working tree from which nothing was installed."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("bra_triton", "kernels", "bench", "yolo_integration"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "photos"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_an_installation_without_tests_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        check.main(["--device", "cpu"])
    assert "check needs a clone of the repository with its tests" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_package_of_the_tree_is_found():
    """pyproject.toml names every package folder (an installation has no others), and `in_tree` finds all."""
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
    # Outside the tree, without the user's site-packages (`-s`): no installed copy may be needed or used.
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
    """The command of `make gpu-check` in the bare tree, with an empty `PATH` and no GPU."""
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


def test_the_modes_are_those_by_which_tests_are_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    tests = (ROOT / "tests" / "gpu" / "test_modes.py").read_text()
    assert {"identity", "auto_pad_soft_diff", "nchw"} <= set(check.all_modes())
    assert 'id=f"{mode.name}-{name}"' in tests


def arguments_of(text):
    """The function that parses the options of a command of the table, and the words that it is to parse."""
    program, *words = shlex.split(text)
    if program == "bra-autotune":
        return autotune._parser().parse_args, words
    module = importlib.import_module(f"bra_triton.bench.{command_line.COMMANDS[words[0]][0]}")
    if words[0] == "kernel-times":
        parser = kernel_report.kernel_options("kernel-times", "", list(module.CHOICES))
        return parser.parse_args, words[1:]
    return module._parse, words[1:]


@pytest.mark.parametrize("table", [check.PARTS, check.REHEARSED], ids=["on a GPU", "rehearsed"])
def test_every_command_of_the_table_is_understood(table, monkeypatch):
    """A misspelt option would otherwise show only on a GPU, and cost the results of its part."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: table is check.PARTS)
    texts = [text for part in table.values() for text in (*part.commands, *part.first.values())]
    assert len(texts) > 4
    for text in texts:
        parse, words = arguments_of(text)
        parse(words)
        if "peers" in text and "--check-only" not in text:
            names = parse(words).problem
            checked = {
                name
                for other in texts
                if "--check-only" in other
                for name in parse(arguments_of(other)[1]).problem
            }
            assert set(names) <= checked


def test_what_cannot_run_here_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    options = check._parse([])
    assert options.parts == [name for name in check.PARTS if name != "models"]
    assert options.notes == ["models was left out: no ultralytics here"]
    options = check._parse(["--device", "cpu", "--parts", "host", "flex", "modes"])
    assert options.parts == ["host", "modes"]
    assert options.notes == ["flex was left out: it needs a GPU"]


def test_a_run_without_a_part_is_refused(capsys):
    """It would check nothing, and pass."""
    with pytest.raises(SystemExit):
        check._parse(["--device", "cpu", "--parts", "flex", "tiles"])
    assert "no part is left to run: flex was left out: it needs a GPU; tiles was" in capsys.readouterr().err


def test_the_plan_begins_with_the_modes_and_has_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = check._parse(["--parts", "small-maps", "peers", "modes", "flex", "largest-map"])
    plan = check.plan_of(options, tmp_path)
    assert list(plan) == ["checks", "small-maps", "peers", "modes", "flex", "largest-map"]
    checks = {job.name: job for job in plan["checks"]}
    kinds = list(dict.fromkeys(name.split()[0] for name in checks))
    assert kinds == [kind for kind in (*check.ORDER_OF_CHECKS, "small-maps") if kind in kinds]
    assert kinds[0] == "mode"
    assert {"flex", "largest-map", "peers", "mode", "small-maps"} <= {*kinds}
    assert {"largest-map issue_21", "mode identity", "mode nchw_padded"} <= checks.keys()
    assert checks["mode identity"].passes == (0,)  # on a GPU, every mode has tests
    assert "file gpu/test_torch_backend" in checks


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
what, numbers = sys.argv[1], Path(sys.argv[-1])
print(f"| {what} |\\n|--|", flush=True)
print("noise", file=sys.stderr)
if what == "fails":
    sys.exit("it broke")
if what == "misses":
    print("MISSED: a target")
    sys.exit(1)
if what == "dies":
    os.kill(os.getpid(), 9)
if what == "stops":
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if what == "hangs":
    numbers.write_text('{"half":')
    time.sleep(60)
if numbers.suffix == ".json":
    numbers.write_text(json.dumps([os.environ.get(name) for name in ("OMP_NUM_THREADS", "TRITON_INTERPRET")]))
"""


class TestRun:
    """The whole command; tests that take no time replace the tests of the modes.

    They run by a copy of `in_tree`, in a tree whose `bra_triton` is empty: importing PyTorch would take two
    seconds of each process.
    """

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
    def run(self, tmp_path, capsys, monkeypatch):
        """Runs the command with `STAND_IN` in place of the benchmarks: exit status, jobs, report."""
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        tests = tmp_path / "tests"
        tests.mkdir()
        monkeypatch.setattr(check, "GPU_TESTS", tests)
        (tests / "test_modes.py").write_text(textwrap.dedent(self.MODES))
        (tests / "test_other.py").write_text("def test_it(): pass")
        (tmp_path / "stand_in.py").write_text(STAND_IN)
        program = (sys.executable, str(tmp_path / "stand_in.py"))
        benches = {"bra-bench": program, "bra-autotune": (*program, "tunes")}
        for folder in ("bench", "bra_triton"):
            (tmp_path / folder).mkdir()
        (tmp_path / "bra_triton" / "__init__.py").touch()
        interpreter, in_tree, *pytest_words = check.PROGRAMS["pytest"]
        pytests = (interpreter, shutil.copy(in_tree, tmp_path / "bench"), *pytest_words)
        monkeypatch.setattr(check, "PROGRAMS", check.PROGRAMS | benches | {"pytest": pytests})

        def run(*flags, **parts):
            parts = {name.replace("_", "-"): check.Part(*part) for name, part in parts.items()}
            monkeypatch.setitem(check.TABLES, "cpu", {"modes": check.Part(0), **parts})
            common = ["--device", "cpu", "--out", str(tmp_path / "out")]
            status = check.main([*common, "--workers", "2", *flags])
            capsys.readouterr()
            return status, *self.results(tmp_path)

        return run

    def results(self, folder):
        results = json.loads((folder / "out" / "results.json").read_text())
        return results["jobs"], (folder / "out" / "report.md").read_text()

    def test_parts_run_in_order_and_what_fails_dies_or_hangs_stops_no_other(self, run):
        status, found, report = run(
            *("--parts", "tiles", "small-maps", "peers"),
            small_maps=(60, ["bra-bench fails", "bra-bench dies", "bra-bench misses", "bra-bench works"]),
            peers=(1, ["bra-bench hangs", "bra-bench works"], {"map": "bra-bench works --check-only"}),
            tiles=(60, ["bra-autotune"]),
        )
        assert status == 1
        assert {name: job["status"] for name, job in found.items()} == {
            **{"peers map": jobs.PASSED, "tiles 1": jobs.PASSED},
            **{"small-maps 1": jobs.FAILED, "small-maps 2": jobs.FAILED, "small-maps 3": jobs.FAILED},
            **{"small-maps 4": jobs.PASSED, "peers 1": jobs.NOT_FINISHED, "peers 2": jobs.NOT_FINISHED},
        }
        assert list(found)[:2] == ["peers map", "tiles 1"]
        reasons = [found[f"small-maps {i}"]["failures"][0] for i in (1, 2, 3)]
        assert "exit status 1" in reasons[0]
        assert "it broke" in reasons[0]  # printed to stderr
        assert "exit status -9" in reasons[1]
        assert reasons[2] == "MISSED: a target"
        # Measurements have no limit of threads and do not use the interpreter.
        assert found["small-maps 4"]["numbers"] == [None, "0"]
        assert "output" not in found["peers map"]
        # The report has what a killed command had printed, but not its numbers, of which it wrote half.
        assert found["peers 1"]["output"] == "| hangs |\n|--|\n"
        assert "numbers" not in found["peers 1"]
        assert "3 of 8 commands passed." in report
        assert re.search(r"\| small-maps \| small-maps 2 \| failed +\| \d", report)
        assert "# peers: not finished, 1 s\n\n`bra-bench hangs`" in report
        assert "\n| works |\n|--|\n" in report
        assert "noise" not in report.split("# small-maps: ")[-1]

    def test_checks_have_one_thread_each_and_the_interpreter(self, run, tmp_path):
        run("--parts", "peers", peers=(60, [], {"map": "bra-bench works"}))
        numbers = json.loads((tmp_path / "out" / "logs" / "peers-map.json").read_text())
        assert numbers == ["1", "1"]

    def test_a_stopped_run_has_a_report_and_leaves_no_process_behind(self, run, tmp_path):
        start, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit, match="stopped"):
            run("--parts", "tiles", "peers", tiles=(60, ["bra-autotune"]), peers=(60, ["bra-bench stops"]))
        assert time.monotonic() - start < 20
        assert signal.getsignal(signal.SIGTERM) == before
        found, report = self.results(tmp_path)
        assert [job["status"] for job in found.values()] == [jobs.PASSED, jobs.NOT_FINISHED]
        assert "1 of 2 commands passed" in report

    def test_a_failing_mode_gives_status_1_and_the_rest_runs(self, run, monkeypatch):
        monkeypatch.setattr(check, "all_modes", lambda: ["good", "bad", "dead", "absent"])
        status, found, report = run("--parts", "modes")
        assert status == 1
        assert {name: job["status"] for name, job in found.items()} == {
            "mode good": jobs.PASSED,
            "mode bad": jobs.FAILED,
            "mode dead": jobs.FAILED,
            "mode absent": jobs.PASSED,
            "file tests/test_other": jobs.PASSED,
        }
        (failure,) = found["mode bad"]["failures"]
        assert "::test_mode[bad-bf16] - AssertionError: wrong by" in failure
        assert "exit status 3" in found["mode dead"]["failures"][0]
        assert re.search(r"\| mode bad +\| failed +\| [\d.]+ +\| 1 failed, 1 passed, 4 deselected in", report)
        assert re.search(r"\| mode good +\| passed +\| [\d.]+ +\| 3 passed, 3 deselected in", report)
        assert "- mode bad: `FAILED " in report
        assert found["file tests/test_other"]["says"].startswith("1 passed in")

    def test_a_check_that_hangs_leaves_the_measurements_some_of_the_time(self, run):
        parts = {"peers": (60, ["bra-bench works"], {"map": "bra-bench hangs"})}
        status, found, _ = run("--parts", "peers", "--budget-seconds", "3", **parts)
        assert status == 1
        assert [job["status"] for job in found.values()] == [jobs.NOT_FINISHED, jobs.PASSED]

    @pytest.mark.parametrize(("first", "status"), [({}, 0), ({"map": "bra-bench works"}, 1)])
    def test_a_spent_budget_fails_checks_and_cuts_measurements_off(self, run, first, status):
        """An unfinished check is a failure, because it proved nothing; an unfinished measurement is none."""
        flags = ("--parts", "peers", "--budget-seconds", "0")
        actual, found, _ = run(*flags, peers=(60, ["bra-bench works"], first))
        assert actual == status
        assert {job["status"] for job in found.values()} == {jobs.NOT_FINISHED}

    def test_gpu_is_demanded_unless_a_rehearsal_is_asked_for(self, monkeypatch, capsys):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit):
            check.main([])
        assert "--device cpu rehearses" in capsys.readouterr().err


def test_a_part_is_rehearsed_without_a_gpu(tmp_path, capsys):
    assert check.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "small-maps"]) == 0
    report = capsys.readouterr().out
    assert re.search(r"`bra-bench peers .*`\n\ndate .*\n\n## Work of the GPU in us, float32\n", report)
    assert report.splitlines()[-1].startswith(f"passed: {tmp_path / 'report.md'}, ")


def run_one(command, folder, seconds=60.0, passes=(0,)):
    job = jobs.Job("job", "python", [sys.executable, "-c", command], folder / "job.log", passes)
    list(jobs.run_all([job], 1, time.monotonic() + seconds, folder, {}))
    return job


def test_a_job_that_hangs_is_ended_with_what_it_started(tmp_path):
    start = time.monotonic()
    script = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    assert run_one(script, tmp_path, seconds=1.5).status == jobs.NOT_FINISHED
    assert time.monotonic() - start < 20


def jobs_of(folder, *scripts):
    return [
        jobs.Job(str(i), "python", [sys.executable, "-c", script], folder / f"{i}.log")
        for i, script in enumerate(scripts)
    ]


def test_jobs_that_ended_together_are_known_when_the_rest_is_ended(tmp_path, monkeypatch):
    """Two jobs end together, and the caller stops after the first: both have passed, the third is killed."""
    seldom = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(1))
    monkeypatch.setattr(jobs, "time", seldom)
    left = tmp_path / "left"
    late = f"import time, pathlib; time.sleep(4); pathlib.Path({str(left)!r}).touch()"
    three = jobs_of(tmp_path, "pass", "pass", late)
    found = jobs.run_all(three, 3, time.monotonic() + 60, tmp_path, {})
    next(found)
    found.close()
    assert [job.status for job in three] == [jobs.PASSED, jobs.PASSED, jobs.NOT_FINISHED]
    time.sleep(4)
    assert not left.exists()


def test_what_the_deadline_has_ended_is_yielded_too(tmp_path):
    three = jobs_of(tmp_path, "pass", "import time; time.sleep(60)", "pass")
    found = list(jobs.run_all(three, 1, time.monotonic() + 2, tmp_path, {}))
    assert found == three
    assert [job.status for job in found] == [jobs.PASSED, jobs.NOT_FINISHED, jobs.NOT_FINISHED]


@pytest.mark.parametrize("line", ["FAILED x - `b` is no c", "`b` is no c"])
def test_a_reason_ends_no_inline_code(line, tmp_path):
    """The report puts each reason in backticks, so a reason must not contain backticks."""
    outcome = run_one(f"print({line!r}); raise SystemExit(1)", tmp_path)
    assert "'b' is no c" in outcome.failures[0]


@pytest.mark.parametrize(("passes", "status"), [((0,), jobs.FAILED), ((0, 5), jobs.PASSED)])
def test_a_file_of_which_no_test_runs_here_is_no_failure(passes, status, tmp_path):
    """pytest exits with 5 if all tests of a file are deselected; for the tests of a mode, 5 is a failure."""
    outcome = run_one("print('1 deselected'); raise SystemExit(5)", tmp_path, passes=passes)
    assert (outcome.status, outcome.says) == (status, "1 deselected")


def test_report_of_nothing():
    report = check.markdown({"versions": {"card": None, "torch": "2"}, "notes": ["a note"], "jobs": {}})
    assert "- a note" in report
    assert "card" not in report
