"""The memory command, on a map small enough for a test."""

import subprocess
import sys

COMMAND = [sys.executable, "-m", "bra_triton.bench.large_map", "--height", "60", "--width", "50"]


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


def test_prints_time_and_peak():
    done = run()
    assert done.returncode == 0
    assert "1 x 20 x 60 x 50" in done.stdout
    assert "peak of the process" in done.stdout


def test_a_peak_past_the_limit_fails():
    done = run("--limit", "0.01")
    assert done.returncode == 1
    assert "FAILED: more than 0.01 GiB" in done.stdout
