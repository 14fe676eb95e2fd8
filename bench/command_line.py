"""`bra-bench`: a sub-command for each measurement; `bra-bench COMMAND --help` lists its options."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import bra_triton

# Module and purpose. A module is imported only when its command is called: some need optional packages.
COMMANDS = {
    "host": ("host", "CPU time of a call beside that of plain attention; needs no GPU"),
    "peers": ("peer_times", "time and memory beside FlexAttention, dense attention and the einops reference"),
    "growth": ("growth", "how time and memory grow with the map, topk and batch: tables and a plot"),
    "models": ("models", "whole models beside the einops reference and the stock YOLO26: time and memory"),
    "exports": ("exports", "the module in ONNX Runtime and OpenVINO, beside the reference's export"),
    "report": ("kernel_report", "registers, spills, issue slots and bounds of every kernel; needs no GPU"),
    "kernel-times": ("kernel_times", "on a GPU: time of every kernel beside its bound"),
    "large-map": ("large_map", "1 x 20 x 600 x 500 on the CPU: time and peak memory"),
    "yolo-costs": ("yolo_costs", "operations of the attention and of the packaged models; needs no GPU"),
    "demo": ("demo", "train YOLO26 with the attention on eight photographs, compare with the reference"),
    "check": ("check", "on a GPU, in 14 minutes at most: every mode against float64, then all measurements"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status of the command."""
    listed = "\n".join(f"  {name:14}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "bra-bench",
        usage="bra-bench COMMAND [OPTION ...]",
        description=f"{__doc__}\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bra-triton {bra_triton.__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    status: int = _module(COMMANDS[command][0], parser.prog + " " + command).main(given[1:])
    return status


def autotune() -> int:
    """Entry point of `bra-autotune`; returns its exit status."""
    status: int = _module("autotune", "bra-autotune").main()
    return status


def _module(name: str, command: str) -> Any:
    """The module of a command; exits with a message if a package that it imports is not installed."""
    try:
        return importlib.import_module(f"bra_triton.bench.{name}")
    except ModuleNotFoundError as error:
        sys.exit(f"{command} needs a package that is not installed: {error}")


if __name__ == "__main__":
    sys.exit(main())
