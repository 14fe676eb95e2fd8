"""Commands that run beside each other until a deadline."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, NOT_FINISHED = "passed", "failed", "not finished"
LOG_TAIL = 2000
# How lines begin that name a failure: in pytest's summary, and in what `bra-bench` prints.
NAMES_A_FAILURE = ("FAILED", "ERROR", "MISSED", "not seen on the GPU")


@dataclass(frozen=True)
class Job:
    """A command."""

    name: str  # what it is reported under
    command: Sequence[str]  # program and arguments
    log: Path  # receives what it prints; a file `.err` beside it what it prints as errors
    passes: Sequence[int] = (0,)  # the exit statuses that are no failure


@dataclass
class Outcome:
    """What became of a job."""

    name: str
    status: str = NOT_FINISHED  # or PASSED or FAILED
    seconds: float = 0.0
    says: str = ""  # the last line that it printed; pytest's has the numbers of tests
    # The lines in which it names a failure, as pytest's summary does; else the end of its log.
    failures: list[str] = field(default_factory=list)


def run_all(
    jobs: Sequence[Job], workers: int, deadline: float, cwd: Path, environment: Mapping[str, str]
) -> Iterator[Outcome]:
    """Runs the jobs in order, `workers` at a time, and yields their outcomes as they come.

    At the deadline (of `time.monotonic`), or when this process is stopped, what runs is ended, and what has
    not begun does not begin. Commands run in the folder `cwd`, in this process's environment with
    `environment` added.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            pending = [pool.submit(run_one, job, deadline, cwd, environment, stop) for job in jobs]
            for future in as_completed(pending):
                yield future.result()
        finally:
            stop.set()


def run_one(
    job: Job, deadline: float, cwd: Path, environment: Mapping[str, str], stop: threading.Event
) -> Outcome:
    """Runs one job; see `run_all`."""
    start, outcome = time.monotonic(), Outcome(job.name)
    if start >= deadline or stop.is_set():
        return outcome
    job.log.parent.mkdir(parents=True, exist_ok=True)
    errors = job.log.with_suffix(".err")
    with job.log.open("wb") as log, errors.open("wb") as error_log:
        # A session of its own, so that what it starts can be ended with it.
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=error_log,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    while (code := process.poll()) is None and time.monotonic() < deadline and not stop.is_set():
        stop.wait(0.05)
    outcome.seconds = round(time.monotonic() - start, 1)
    lines = job.log.read_text(errors="replace").strip().splitlines() or [""]
    outcome.says = lines[-1][:100]
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # a process that waits for a GPU that hangs cannot even be killed
    elif code in job.passes:
        outcome.status = PASSED
    else:
        outcome.status = FAILED
        text = "\n".join([*lines, errors.read_text(errors="replace").strip()])
        named = [line for line in lines if line.startswith(NAMES_A_FAILURE)]
        outcome.failures = named or [f"exit status {code}: ...{text[-LOG_TAIL:]}"]
    return outcome
