"""The map of rayleizhu/BiFormer's issue 21, forward and backward: time and peak memory of the process.

In that issue a 1 x 20 x 600 x 500 map (n_win 7, topk 4, 4 heads of 5 channels, with padding) took about 100
GB: the gathered keys and values, and the attention matrix of 300 thousand queries and 24 thousand keys each.
"""

from collections.abc import Sequence

import torch

from bra_triton import BiLevelRoutingAttention
from bra_triton.bench import measure
from bra_triton.bench.console import conclude, parser_of
from bra_triton.bench.problems import PROBLEMS

LIMIT = 3.0  # GiB; more is a failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the map and prints the figures; returns 1 if the process held more memory than `LIMIT`."""
    parser_of("large-map", __doc__, has_json=False).parse_args(arguments)
    problem = PROBLEMS["issue_21"]
    module = BiLevelRoutingAttention(**problem.module_arguments, backend="torch")
    x = torch.randn(1, problem.height, problem.width, problem.dim, requires_grad=True)
    outputs: list[torch.Tensor] = []
    forward = measure.wall_seconds(lambda: outputs.append(module(x)))
    backward = measure.wall_seconds(lambda: outputs[0].sum().backward())
    peak = measure.process_peak_bytes() / 2**30
    print(f"1 x {problem.dim} x {problem.height} x {problem.width}, {torch.get_num_threads()} threads, CPU")
    print(f"forward {forward:.1f} s, backward {backward:.1f} s, peak of the process {peak:.2f} GiB")
    return conclude([f"more than {LIMIT} GiB"] if peak > LIMIT else [], "FAILED")
