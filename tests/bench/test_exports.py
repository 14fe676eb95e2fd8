"""`bra-bench exports` on a tiny map: both runtimes run, and a wrong or slow export is reported."""

from dataclasses import replace

import pytest

from bra_triton.bench import exports
from bra_triton.bench.problems import PROBLEMS

TINY = replace(PROBLEMS["tiny"], side_dwconv=5)


@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize("runtime", exports.RUNTIMES)
def test_exports_are_compared_and_timed(runtime, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # OpenVINO also runs the module without a trace
    package, export = exports.RUNTIMES[runtime]
    pytest.importorskip(package)
    row = exports.measure_exports(TINY, export, repeats=1)
    assert row.keys() == {"fused", "reference"}
    assert min(figures["inference ms"] for figures in row.values()) > 0


def test_an_export_that_computes_something_else_is_not_timed():
    def doubled(module, x):
        return lambda: 2 * module(x).detach()

    with pytest.raises(RuntimeError, match="the output of the export, fused, is off by"):
        exports.measure_exports(TINY, doubled, repeats=1)


@pytest.mark.parametrize(("fused", "status", "verdict"), [(1.0, 0, "met"), (1.1, 1, "MISSED")])
def test_status_says_whether_the_export_is_as_fast(fused, status, verdict, monkeypatch, capsys):
    monkeypatch.setattr(exports, "PRESET", {"tiny": TINY})
    monkeypatch.setattr(exports, "RUNTIMES", {"a runtime": ("torch", None)})
    row = {name: {"inference ms": x} for name, x in (("fused", fused), ("reference", 1.0))}
    monkeypatch.setattr(exports, "measure_exports", lambda *_: row)
    assert exports.main([]) == status
    assert verdict in capsys.readouterr().out


def test_without_a_runtime_there_is_nothing_to_time(monkeypatch, capsys):
    monkeypatch.setattr(exports, "RUNTIMES", {"a runtime": ("no_such_package", None)})
    with pytest.raises(SystemExit):
        exports.main([])
    assert "none of no_such_package is installed" in capsys.readouterr().err
