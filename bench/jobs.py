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
LOG_TAIL = 500
# How lines begin that name a failure: in pytest's summary, and in what `bra-bench` prints.
NAMES_A_FAILURE = ("FAILED", "ERROR", "MISSED", "not seen on the GPU")


@dataclass
class Job:
    """A command, and what became of it."""

    name: str  # what it is reported under
    text: str  # what a user types
    command: Sequence[str]  # program and arguments
    log: Path  # receives what it prints; a file `.err` beside it what it prints as errors
    passes: Sequence[int] = (0,)  # the exit statuses that are no failure
    status: str = NOT_FINISHED  # or PASSED or FAILED
    seconds: float = 0.0
    says: str = ""  # the last line that it printed; pytest's has the numbers of tests
    # The lines in which it names a failure, as pytest's summary does; else the end of its log.
    failures: list[str] = field(default_factory=list)

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run_all(
    jobs: Sequence[Job], workers: int, deadline: float, cwd: Path, environment: Mapping[str, str]
) -> Iterator[Job]:
    """Runs the jobs in order, `workers` at a time, and yields each when it has ended.

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
) -> Job:
    """Runs one job; see `run_all`."""
    start = time.monotonic()
    if start >= deadline or stop.is_set():
        return job
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
    job.seconds = round(time.monotonic() - start, 1)
    lines = job.printed.strip().splitlines() or [""]
    job.says = lines[-1][:100]
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # a process that waits for a GPU that hangs cannot even be killed
    elif code in job.passes:
        job.status = PASSED
    else:
        job.status = FAILED
        words = " ".join([*lines, errors.read_text(errors="replace")]).replace("`", "'").split()
        named = [line for line in lines if line.startswith(NAMES_A_FAILURE)]
        job.failures = named or [f"exit status {code}: ...{' '.join(words)[-LOG_TAIL:]}"]
    return job
