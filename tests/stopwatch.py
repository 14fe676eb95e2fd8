"""Runs the tuner with a timer made for tests, on a shape so small that every tile can be tried."""

import math

from bra_triton.bench import autotune
from bra_triton.kernels import overrides

# One region of 2 x 2 tokens, so that there are few tiles and programs: the interpreter is slow for each.
TINY = ["--shape", *"1 2 2 16".split(), "--num-heads", "1", "--n-win", "1", "--topk", "1"]
FORWARD_TINY = [*TINY, "--kernel", "forward"]


class Stopwatch:
    """A timer that runs each launch once and measures nothing.

    It returns the milliseconds that the test gives for the tile, else 1. After `stop_after` runs it raises
    `KeyboardInterrupt`.
    """

    def __init__(self, milliseconds=None, stop_after=math.inf):
        self.milliseconds, self.stop_after, self.timed = milliseconds or {}, stop_after, []

    def __call__(self, run):
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        run()
        ((_, tile),) = overrides.in_force().tiles
        self.timed.append(tile)
        return self.milliseconds.get(tile, 1.0)


def measure(argv, timer, device):
    args = autotune._parser().parse_args(argv)
    autotune.measure(args, autotune._problems(args), device, timer)
