"""What a measurement was taken on and with: it stands beside every figure."""

import datetime
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, str | None]:
    """Card, driver and versions; None for what is not there."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "card": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_gpu
        else None,
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str | None:
    """What `$BRA_TRITON_COMMIT` says, for copies without git; else the checkout's, `-dirty` where it differs.

    None where there is neither.
    """
    return os.environ.get("BRA_TRITON_COMMIT") or _first_line(
        "git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"
    )


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if lines else None
