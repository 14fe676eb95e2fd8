"""Commands that run beside each other until a deadline, and what pytest says of its tests."""

import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, SKIPPED, NOT_FINISHED = "passed", "failed", "skipped", "not finished"
LOG_TAIL = 2000
NO_TESTS = 5  # how pytest ends where all tests of a file were deselected


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: what it is reported under.
        command: program and arguments.
        log: the file that receives what it prints.
        junit: the file that pytest writes, if it is pytest.
        tests: ids of the tests that it runs, where they are known beforehand.
    """

    name: str
    command: Sequence[str]
    log: Path
    junit: Path | None = None
    tests: Sequence[str] = ()


@dataclass
class Outcome:
    """What became of a job: `PASSED`, `FAILED` or `NOT_FINISHED`, and of each of its tests."""

    name: str
    status: str
    seconds: float
    tests: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # by test, or by the job itself: the reason


def run_all(
    jobs: Sequence[Job], workers: int, deadline: float, cwd: Path, environment: Mapping[str, str]
) -> Iterator[Outcome]:
    """Runs the jobs in order, `workers` at a time, and yields their outcomes as they come.

    Args:
        jobs: what to run.
        workers: how many beside each other.
        deadline: of `time.monotonic`; what runs then is ended, what has not begun does not begin.
        cwd: where the commands run.
        environment: added to this process's.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(run_one, job, deadline, cwd, environment) for job in jobs]
        for future in as_completed(pending):
            yield future.result()


def run_one(job: Job, deadline: float, cwd: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs one job; see `run_all`."""
    start = time.monotonic()
    code: int | None = None
    if start < deadline:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("wb") as log:
            # A session of its own, so that what it starts can be ended with it.
            process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env={**os.environ, **environment},
                start_new_session=True,
            )
            try:
                code = process.wait(deadline - start)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if job.junit is not None and code == NO_TESTS:
        code = 0
    status = {None: NOT_FINISHED, 0: PASSED}.get(code, FAILED)
    outcome = Outcome(job.name, status, time.monotonic() - start)
    if job.junit is not None and job.junit.exists():
        outcome.tests, outcome.failures = read_junit(job.junit)
    for test in job.tests:
        outcome.tests.setdefault(test, NOT_FINISHED)
    if status == FAILED and not outcome.failures:
        outcome.failures[job.name] = (
            f"exit status {code}: ...{job.log.read_text(errors='replace')[-LOG_TAIL:]}"
        )
    return outcome


def read_junit(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Status of every test in a report of pytest, and the first line of why the failed ones failed."""
    statuses: dict[str, str] = {}
    failures: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "")
        problem = next((x for x in (case.find("failure"), case.find("error")) if x is not None), None)
        if problem is not None:
            statuses[name] = FAILED
            failures[name] = (problem.get("message") or problem.text or "").strip().split("\n")[0][:500]
        else:
            statuses.setdefault(name, PASSED if case.find("skipped") is None else SKIPPED)
    return statuses, failures
