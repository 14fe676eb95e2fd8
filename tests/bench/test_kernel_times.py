"""Measured times beside predicted ones: the arithmetic; the measuring itself needs a GPU."""

from types import SimpleNamespace

import pytest
import torch

from bra_triton.bench import kernel_report, kernel_times
from bra_triton.bench.machine_code.small_kernels import SmallCost, Work


def row(bounds, kernel="route"):
    small = bounds and SmallCost(Work((1,), 0, 0), 1, bounds)
    analysis = SimpleNamespace(loop=None)
    nothing = {"cost": None, "floor": None, "target": None}
    return kernel_report.Row("p", "sm_90", kernel, analysis, None, False, small=small, **nothing)


def test_of_several_launches_of_a_kernel_each_has_its_own_times(monkeypatch):
    """Keys' and queries' lists, by turns; `route` is launched twice as it is, and both count."""
    monkeypatch.setattr(kernel_times, "REPEATS", 2)
    bound = {"memory": 1e-6}
    rows = [row(bound, name) for name in ("list_tokens", "route", "list_tokens")]
    measured = {"list_tokens": [1e-6, 5e-6, 1e-6, 5e-6], "route": [1e-6, 3e-6, 1e-6, 3e-6]}
    lines = kernel_times.compare_all(rows, measured)
    assert [line["measured us"] for line in lines] == [1.0, 2.0, 5.0]


def test_the_median_launch_beside_the_bound_that_binds():
    line = kernel_times.compare(row({"issue": 2e-6, "memory": 1e-6}), [9e-6, 3e-6, 4e-6])
    assert line == {
        **{"preset": "p", "kernel": "route", "tile": ""},
        **{"measured us": 4.0, "predicted us": 2.0, "binds": "issue", "ratio": 2.0},
    }


@pytest.mark.parametrize(("bounds", "times"), [(None, [1e-6]), ({"memory": 1e-6}, [])])
def test_what_is_not_known_is_left_empty(bounds, times):
    assert kernel_times.compare(row(bounds), times)["ratio"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        kernel_times.main([])
    assert "kernel_report predicts without one" in capsys.readouterr().err
