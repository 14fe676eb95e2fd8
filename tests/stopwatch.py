"""The tuner with a timer of the test's own, on a shape so small that everything can be tried."""

import math

from bra_triton.bench import autotune
from bra_triton.kernels.tiles import choice

# One region of 2 x 2 tokens and few tiles: the interpreter takes its time for every program.
TINY = ["--shape", *"1 2 2 16".split(), "--num-heads", "1", "--n-win", "1", "--topk", "1"]
FORWARD_TINY = [*TINY, "--kernel", "forward"]


class Stopwatch:
    """A timer that runs nothing twice: what the test says for a tile, else 1 ms."""

    def __init__(self, milliseconds=None, stop_after=math.inf):
        self.milliseconds, self.stop_after, self.timed = milliseconds or {}, stop_after, []

    def __call__(self, run):
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        run()
        tile = next(iter(choice._forced.get().values()))
        self.timed.append(tile)
        return self.milliseconds.get(tile, 1.0)


def measure(argv, timer, device):
    args = autotune._parser().parse_args(argv)
    autotune.measure(args, autotune._problems(args), device, timer)
