"""Draws configurations and ways to call them, for a given time, and compares the results with float64.

    python -m tests.fuzz --minutes 60

A configuration has arguments, sizes, strides, a dtype and a backend. The tests `test_properties` and
`test_nchw_properties` say how it is drawn and how results are compared. A module is called in one of `WAYS`.
Errors past the tolerance are printed with the configuration and the seed; the exit status is 1 if there was
one.
"""

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

os.environ |= {"TRITON_INTERPRET": "1"} | os.environ  # Triton reads it at import
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "bra_triton"))

import properties
import test_nchw_properties as of_nchw
import test_properties as of_nhwc
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption
from problems import relative_error
from torch.utils.checkpoint import checkpoint

# Configurations in a round of the torch backend; after each round the elapsed time is checked.
EXAMPLES = 5
# Most rounds use the torch backend: Triton's interpreter takes a hundred times as long.
BACKENDS = ("torch", "torch", "torch", "triton")


def _compiled(module, x):
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager")(x)


def _in_threads(module, x):
    """Calls the module, then its forward and backward in three threads at once; all bits must be equal."""

    def step(_):
        own = x.detach().requires_grad_()
        out = module(own)
        return out.detach(), torch.autograd.grad(out.sum(), own)[0]

    # Down-sampling may draw samples when it trains, and all threads draw from the same generator.
    assume(not (module.training and getattr(module, "kv_down", None)))
    out = module(x)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(step, range(3)))
    assert all(torch.equal(out, other) for other, _ in results)
    assert all(torch.equal(results[0][1], gradient) for _, gradient in results)
    return out


def _without_gradient_first(module, x):
    state = torch.get_rng_state()
    with torch.inference_mode():
        alone = module(x)
    torch.set_rng_state(state)
    out = module(x)
    # Without a gradient the output takes another path. Before LePE is added, it is rounded once more or less.
    assert relative_error(alone, out.double()) < properties.TOLERANCES[out.dtype]
    return out


WAYS = {
    "eager": torch.nn.Module.__call__,
    "checkpointed": partial(checkpoint, use_reentrant=False),
    "compiled": _compiled,
    "in threads": _in_threads,
    "without a gradient first": _without_gradient_first,
}
KINDS = {
    "module": (of_nhwc.drawn, of_nhwc._module_errors),
    "call": (of_nhwc.drawn_calls, of_nhwc._call_errors),
    "NCHW module": (of_nchw.drawn_modules, of_nchw._module_errors),
    "regional call": (of_nchw.drawn_calls, of_nchw._call_errors),
}


def fuzz(seconds, first_seed):
    """Plays rounds; returns counts by kind, backend, way and dtype, and a text for every failure."""
    tried, failed, number = Counter(), [], first_seed
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        play_round(number, tried, failed)
        number += 1
    return tried, failed


def play_round(number, tried, failed):
    """Draws a kind, a backend and a way from the seed `number`, and tries a few configurations of them."""
    chance = random.Random(number)
    kind, backend = chance.choice(list(KINDS)), chance.choice(BACKENDS)
    # Triton's interpreter holds the number of the current program in one place for all threads.
    ways = [way for way in WAYS if backend == "torch" or way != "in threads"]
    way = chance.choice(ways) if "module" in kind else "eager"
    draw, errors_of = KINDS[kind]
    run = partial(_run, WAYS[way])
    # Hypothesis draws the simplest configuration first, which is the same in all rounds; it is left out.
    is_first = iter([True])

    @seed(number)
    @settings(
        max_examples=1 + (EXAMPLES if backend == "torch" else 1),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(draw(backend))
    def check(drawn):
        if next(is_first, False):
            return
        try:
            properties.judge(errors_of(drawn, backend), drawn)
        except UnsatisfiedAssumption:
            raise
        except Exception:  # every error is a finding, and the fuzzing goes on
            failed.append(
                f"seed {number}, {kind}, {backend}, {way}: {drawn}\n{traceback.format_exc(limit=-3)}"
            )
        tried[kind, backend, way, str(drawn.dtype).removeprefix("torch.")] += 1

    with mock.patch.object(of_nhwc, "run", run), mock.patch.object(of_nchw, "run", run):
        check()


def _run(way, module, x, grad_out, seed):
    """`properties.run` with `way`; the reference is called plainly."""
    is_reference = module.backend == "reference"
    return properties.run(module, x, grad_out, seed, torch.nn.Module.__call__ if is_reference else way)


def main():
    """Prints counts and failures; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, help="seed of the first round (default: the time)")
    options = parser.parse_args()
    first = options.seed if options.seed is not None else int(time.time())
    print(f"first seed {first}", flush=True)
    tried, failed = fuzz(60 * options.minutes, first)
    for key, count in sorted(tried.items()):
        print(f"{count:6}  {', '.join(key)}")
    print(*failed, sep="\n")
    print(f"{tried.total()} configurations, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
