"""The measuring tools, on work whose memory and time are known."""

import time

import pytest
import torch

from bra_triton.bench import measure

CPU = torch.device("cpu")
MIB = 1 << 20


def test_peak_counts_what_is_held_at_once_and_not_what_came_before():
    before = torch.zeros(4 * MIB)

    def run():
        first = torch.zeros(MIB)  # 4 MiB of float32
        second = first + 1
        del first
        third = second + before[:MIB]
        del second, third

    assert measure.peak_bytes(run, CPU) == pytest.approx(8 * MIB, abs=4096)


@torch.library.custom_op("bra_triton_tests::wasteful", mutates_args=())
def wasteful(x: torch.Tensor) -> torch.Tensor:
    """Allocates four times the input's bytes and returns one number."""
    return x.repeat(4).sum()


def test_peak_sees_into_operators():
    x = torch.zeros(MIB)
    assert measure.peak_bytes(lambda: wasteful(x), CPU) == pytest.approx(4 * x.nbytes, abs=4096)


def test_the_median_is_of_the_counted_calls():
    pauses = iter([0.2, 0.2, 0.0001, 0.1, 0.0001])  # the warm-up is not counted
    assert measure.median_device_seconds(lambda: time.sleep(next(pauses)), CPU, repeats=3, warm_up=2) < 0.09
    assert next(pauses, None) is None


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_what_is_off_by_more_than_rounding_is_refused_by_name(wrong):
    x = torch.ones(3)
    measure.check({"sum": x * (1 + 1e-6)}, {"sum": x.double(), "not asked for": x}, 1e-4)
    measure.check({"nothing": 0 * x}, {"nothing": 0 * x}, 1e-4)
    with pytest.raises(measure.WrongResultError, match=r"sum is off by .*, more than 1e-04"):
        measure.check({"sum": x * wrong}, {"sum": x}, 1e-4)
    with pytest.raises(measure.WrongResultError, match="nothing is off by"):
        measure.check({"nothing": x}, {"nothing": 0 * x}, 1e-4)
