"""Commands that run beside each other until a deadline."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, NOT_FINISHED = "passed", "failed", "not finished"
LOG_TAIL = 2000


@dataclass(frozen=True)
class Job:
    """A command."""

    name: str  # what it is reported under
    command: Sequence[str]  # program and arguments
    log: Path  # receives what it prints
    passes: Sequence[int] = (0,)  # the exit statuses that are no failure


@dataclass
class Outcome:
    """What became of a job."""

    name: str
    status: str  # PASSED, FAILED or NOT_FINISHED
    seconds: float
    says: str = ""  # the last line that it printed; pytest's has the numbers of tests
    # The lines in which it names a failure, as pytest's summary does; else the end of its log.
    failures: list[str] = field(default_factory=list)


def run_all(
    jobs: Sequence[Job], workers: int, deadline: float, cwd: Path, environment: Mapping[str, str]
) -> Iterator[Outcome]:
    """Runs the jobs in order, `workers` at a time, and yields their outcomes as they come.

    At the deadline (of `time.monotonic`) what runs is ended, and what has not begun does not begin. Commands
    run in the folder `cwd`, in this process's environment with `environment` added.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(run_one, job, deadline, cwd, environment) for job in jobs]
        for future in as_completed(pending):
            yield future.result()


def run_one(job: Job, deadline: float, cwd: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs one job; see `run_all`."""
    start = time.monotonic()
    if start >= deadline:
        return Outcome(job.name, NOT_FINISHED, 0.0)
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
            return Outcome(job.name, NOT_FINISHED, round(time.monotonic() - start, 1))
    text = job.log.read_text(errors="replace").strip()
    lines = text.splitlines() or [""]
    outcome = Outcome(job.name, PASSED, round(time.monotonic() - start, 1), lines[-1][:100])
    if code not in job.passes:
        outcome.status = FAILED
        named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        outcome.failures = named or [f"exit status {code}: ...{text[-LOG_TAIL:]}"]
    return outcome
