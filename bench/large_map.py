"""The map of rayleizhu/BiFormer's issue 21, forward and backward: time, and the most memory the process held.

    python -m bra_triton.bench.large_map [--height 600 --width 500 ...]

There a 1 x 20 x 600 x 500 map (n_win 7, topk 4, 4 heads of 5) took about 100 GB: gathered keys and values,
and the attention matrix of 24 thousand keys for each of 300 thousand queries. The map is padded, as its sides
are no multiples of 7.
"""

import argparse
import resource
import sys
import time

import torch

from bra_triton import BiLevelRoutingAttention

GIB = 2**30
LIMIT_GIB = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Runs it and prints the figures; returns 1 if the process held more than the limit."""
    options = _parse(arguments)
    module = BiLevelRoutingAttention(
        options.dim, options.num_heads, options.n_win, topk=options.topk, auto_pad=True, backend="torch"
    )
    x = torch.randn(1, options.height, options.width, options.dim, requires_grad=True)
    start = time.perf_counter()
    out = module(x)
    forward = time.perf_counter() - start
    out.sum().backward()
    backward = time.perf_counter() - start - forward
    peak = peak_bytes() / GIB
    print(f"1 x {options.dim} x {options.height} x {options.width}, {torch.get_num_threads()} threads, CPU")
    print(f"forward {forward:.1f} s, backward {backward:.1f} s, peak of the process {peak:.2f} GiB")
    if peak > options.limit:
        print(f"FAILED: more than {options.limit} GiB")
    return int(peak > options.limit)


def peak_bytes() -> int:
    """The most memory that this process has held resident so far, libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("height", 600), ("width", 500), ("dim", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("num-heads", 4), ("n-win", 7), ("topk", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--limit", type=float, default=LIMIT_GIB, help="GiB; more is a failure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
