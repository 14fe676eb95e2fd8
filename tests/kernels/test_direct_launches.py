"""Direct launches equal those of Triton's ordinary path, which is taken where direct ones would be wrong.

Kernels are compiled for a card of compute capability 9.0; a stand-in for the driver logs the launches.
"""

from dataclasses import replace

import pytest
from launch_log import FORMS, HEAD, holds_tensors, step
from torch import Tensor

from bra_triton.kernels import calls, plan
from bra_triton.kernels.plan import Plan

pytestmark = pytest.mark.compiled


def _as_addresses(value):
    """An argument with the address in the place of every tensor; "nothing" for a tensor without elements."""
    if isinstance(value, Tensor):
        return value.data_ptr() if value.numel() else "nothing"
    return tuple(map(_as_addresses, value)) if isinstance(value, tuple) else value


def _without_empty(direct, ordinary):
    """Direct arguments, with "nothing" wherever the ordinary ones have it: arrays without elements."""
    if ordinary == "nothing":
        return ordinary
    if isinstance(ordinary, tuple):
        return tuple(map(_without_empty, direct, ordinary))
    return direct


@pytest.mark.parametrize("form", FORMS)
def test_a_direct_launch_has_the_arguments_of_the_ordinary_one(form, log, monkeypatch):
    names = []
    launch = Plan._launch

    def launch_twice(self, tensors):
        launch(self, tensors)
        direct = log.take()
        self._launch_by_triton(tensors)
        ordinary = log.take()
        assert len(direct) == len(ordinary) == len(self.launches)
        for planned, (run, args), (ordinary_run, ordinary_args) in zip(
            self.launches, direct, ordinary, strict=True
        ):
            assert run is ordinary_run, planned.name  # of the same compiled kernel
            # Grid, stream, function and packed metadata; then the hooks' metadata and two hooks, all None.
            assert args[:6] == ordinary_args[:6]
            assert args[6:HEAD] == (None,) * 3
            expected = tuple(map(_as_addresses, ordinary_args[HEAD:]))
            actual = _without_empty(args[HEAD:], expected)
            assert actual == expected, planned.name
            assert not holds_tensors(args)
            names.append(planned.name)

    problem = FORMS[form]()
    calls.forget_plans()
    step(problem)  # the first time compiles
    log.take()
    monkeypatch.setattr(Plan, "_launch", launch_twice)
    step(problem)
    kinds = {"nchw": "finish_gradients_kernel", "pooling": "pool_kernel"}
    kinds |= {"soft": "spread_means_kernel", "padded hard": "finish_gradients_kernel"}
    kinds |= dict.fromkeys(("small map", "small map, soft, padded"), "small_map_backward_kernel")
    assert kinds.get(form, "attention_forward_kernel") in names


def _are_direct(launches):
    direct = {not holds_tensors(args) for _, args in launches}
    assert len(direct) == 1
    return direct.pop()


def _shifted(x):
    """A copy at an address that is 2 or 4 bytes past a multiple of 16."""
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("name", ["qkv", "kv", "padding", "means", "lepe_weight", "lepe_bias"])
def test_tensors_that_start_elsewhere_are_launched_by_triton(name, log):
    """A kernel that is compiled for addresses at multiples of 16 bytes would read them wrongly, or fault."""
    form = {"kv": "pooled", "padding": "padded", "means": "router"}.get(name, "plain")
    problem = FORMS[form]()
    shifted = replace(problem, **{name: _shifted(getattr(problem, name))})

    def launch(problem):
        calls.attend(problem, trains=True)
        return log.take()

    for first in (problem, shifted):  # the tensors for which the plan is made and compiled
        calls.forget_plans()
        launch(first)
        aligned, misaligned = launch(problem), launch(shifted)
        assert _are_direct(aligned)
        assert not _are_direct(misaligned)
        # At least one kernel is another one, which is compiled for any address.
        assert {id(run) for run, _ in aligned} != {id(run) for run, _ in misaligned}
        assert _are_direct(launch(problem))


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_whoever_watches_launches_gets_them_by_triton(which, log):
    problem, runtime = FORMS["plain"](), plan._runtime

    def launch():
        calls.attend(problem, trains=False)
        return log.take()

    calls.forget_plans()
    assert not _are_direct(launch())  # the first time compiles
    assert _are_direct(launch())
    before = getattr(runtime, which)
    watch = print
    try:
        if hasattr(before, "add"):
            before.add(watch)
        else:  # Triton 3.4
            setattr(runtime, which, watch)
        watched = launch()
    finally:
        if hasattr(before, "remove"):
            before.remove(watch)
        else:
            setattr(runtime, which, before)
    assert not _are_direct(watched)
    at = 7 if which == "launch_enter_hook" else 8
    assert all(args[at] is not None for _, args in watched)
    assert _are_direct(launch())
