"""`bra-bench growth`: the fitted exponents are right, and a sweep is measured and drawn."""

import math
import re
from dataclasses import replace

import pytest

from bra_triton.bench import growth, peer_times
from bra_triton.bench.problems import PROBLEMS


def test_every_sweep_varies_one_quantity():
    for _, problems in growth.SWEEPS.values():
        first, *others = problems.values()
        assert others
        names = {
            name for other in others for name in vars(first) if getattr(first, name) != getattr(other, name)
        }
        assert names in ({"height", "width"}, {"topk"}, {"batch"})


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_the_exponent_of_a_power(power):
    assert growth.exponent({x: 3 * x**power for x in (1, 2, 5, 9)}) == pytest.approx(power)
    assert math.isnan(growth.exponent({1: 2.0}))


@pytest.fixture
def tiny(monkeypatch):
    problems = {n: replace(PROBLEMS["tiny"], batch=n) for n in (1, 2)}
    monkeypatch.setitem(growth.SWEEPS, "batch", ("images", problems))


@pytest.mark.usefixtures("tiny")
def test_a_sweep_is_measured_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert growth.main(["--sweep", "batch", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    *_, exponents, drawn = printed.splitlines()
    assert len(re.findall(r"-?\d+\.\d\d", exponents)) == len(growth.PEERS) * len(growth.FIGURES)
    assert drawn == f"drawn: {tmp_path / 'growth.png'}"
    assert all(f"{peer} training, MiB" in printed for peer in growth.PEERS)


@pytest.mark.usefixtures("tiny")
def test_a_wrong_result_is_said_and_left_out(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    measure_row = peer_times.measure_row

    def spoiled(*arguments):
        row = measure_row(*arguments)
        row["peers"]["dense"]["forward"] = {"status": "refused", "why": "output is off"}
        return row

    monkeypatch.setattr(peer_times, "measure_row", spoiled)
    assert growth.main(["--sweep", "batch", "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED: tiny, batch 1, dense, forward: output is off" in capsys.readouterr().out


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        growth.main(["--repeats", "0"])
    assert "argument --repeats: must be at least 1, got 0" in capsys.readouterr().err
