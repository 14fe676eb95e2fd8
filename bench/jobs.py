"""Runs commands, several at a time, until a deadline."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, NOT_FINISHED = "passed", "failed", "not finished"
LOG_TAIL = 500
# How lines begin that name a failure, in pytest's summary and in the output of `bra-bench`.
NAMES_A_FAILURE = ("FAILED", "ERROR", "MISSED", "not seen on the GPU")


@dataclass
class Job:
    """A command and its result."""

    name: str  # the job's name in the report
    text: str  # the command as a user types it
    command: Sequence[str]  # program and arguments
    log: Path  # receives stdout; a file `.err` beside it receives stderr
    passes: Sequence[int] = (0,)  # exit statuses that are no failure
    status: str = NOT_FINISHED  # or PASSED or FAILED
    seconds: float = 0.0
    says: str = ""  # the last line of stdout; pytest's last line has the numbers of tests
    # If it failed: the lines that name a failure, as in pytest's summary, or else the end of its output.
    failures: list[str] = field(default_factory=list)

    @property
    def printed(self) -> str:
        """What the command has written to stdout so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run_all(
    jobs: Sequence[Job], workers: int, deadline: float, cwd: Path, environment: Mapping[str, str]
) -> Iterator[Job]:
    """Runs the jobs in order, `workers` at a time, and yields each when it has ended, or at the deadline.

    At the deadline (a time of `time.monotonic`), or when this process is stopped, the running jobs are
    killed, and no other job starts. `environment` is added to this process's environment.
    """
    waiting = [*jobs]
    running: list[tuple[Job, subprocess.Popen[bytes], float]] = []  # and the times of their start
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running.append((job, _start(job, cwd, environment), time.monotonic()))
            time.sleep(0.05)
            ended = [each for each in running if each[1].poll() is not None]
            running = [each for each in running if each not in ended]
            for job, process, start in ended:  # all before the first yield: there a caller may close this
                _note(job, process.returncode, start)
            yield from (job for job, _, _ in ended)
    finally:
        for _, process, _ in running:
            os.killpg(process.pid, signal.SIGKILL)
        for job, process, start in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # a process cannot be killed while it waits for a GPU that hangs
            _note(job, None, start)
    yield from (job for job, _, _ in running)
    yield from waiting


def _start(job: Job, cwd: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log, job.log.with_suffix(".err").open("wb") as errors:
        # In a new session, so that the processes that the command starts can be killed with it.
        return subprocess.Popen(
            job.command,
            stdout=log,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def _note(job: Job, code: int | None, start: float) -> None:
    """Stores the result of a job; `code` is its exit status, or None if it was killed."""
    job.seconds = round(time.monotonic() - start, 1)
    lines = job.printed.replace("`", "'").strip().splitlines() or [""]
    job.says = lines[-1][:100]
    if code is None:
        return
    job.status = PASSED if code in job.passes else FAILED
    if job.status == FAILED:
        errors = job.log.with_suffix(".err").read_text(errors="replace")
        words = " ".join([*lines, errors.replace("`", "'")]).split()
        named = [line[-LOG_TAIL:] for line in lines if line.startswith(NAMES_A_FAILURE)]
        job.failures = named or [f"exit status {code}: ...{' '.join(words)[-LOG_TAIL:]}"]
