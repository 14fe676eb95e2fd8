"""Which backend serves a call, and the error if the named backend cannot."""

import logging
import threading
from dataclasses import dataclass

import pytest
import torch

from bra_triton import functional
from bra_triton.backend import availability
from bra_triton.backend import select as selection
from bra_triton.call import Call
from bra_triton.kernels.bounded import Bounded
from bra_triton.kernels.grid import RegionGrid
from bra_triton.modules import downsampling
from bra_triton.regional_call import RegionalCall
from bra_triton.spec import AttentionSpec


def _projection(dtype=torch.float32, device="cpu"):
    return torch.zeros(1, 4, 4, 96, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Request:
    """Implements `bra_triton.call.Request`."""

    like: torch.Tensor
    head_dims: tuple[int, int] = (32, 32)
    grids: tuple[RegionGrid, ...] = (RegionGrid.of_windows(4, 4, 2),)
    routes: bool = True
    calls: str = ""


def _select(name, *request, **changed):
    """Name of the backend that serves."""
    return selection.select(name, _Request(*request, **changed)).name


@pytest.fixture(autouse=True)
def _cpu_tensors_are_served(monkeypatch):
    """With a GPU and no interpreter, CPU tensors would be refused before the reason that is tested."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_auto_takes_triton_where_it_can(device):
    assert _select("auto", _projection(device=device)) == "triton"


def test_auto_takes_torch_for_float64_and_says_why(device, caplog):
    selection._logged.clear()
    with caplog.at_level(logging.INFO, logger="bra_triton"):
        assert _select("auto", _projection(torch.float64, device=device)) == "torch"
    assert "'triton' is skipped: dtype must be float32, float16 or bfloat16, got torch.float64" in caplog.text


def test_cpu_tensors_without_the_interpreter_take_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert _select("auto", _projection()) == "torch"
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot serve: tensors on the CPU need TRITON_INTERPRET=1"
    ):
        _select("triton", _projection())


@pytest.mark.parametrize(
    ("qkv", "heads", "grid", "reason"),
    [
        (_projection(torch.float64), (32, 32), RegionGrid.of_windows(4, 4, 2), "got torch.float64"),
        (_projection(device="meta"), (32, 32), RegionGrid.of_windows(4, 4, 2), "not on 'meta'"),
        (_projection(), (257, 257), RegionGrid.of_windows(4, 4, 2), "at most 256 wide, got 257"),
        (
            *(_projection(), (32, 32), RegionGrid.of_windows(130, 65, 65)),
            "at most 4096 regions, got 130 x 65 tokens in 65 x 65 regions; lower n_win",
        ),
        (
            *(_projection(), (32, 32), RegionGrid.of_windows(2**16, 2**15, 2)),
            r"fewer than 2\*\*31 tokens, got 65536 x 32768",
        ),
    ],
)
def test_what_the_kernels_cannot_serve_is_named(qkv, heads, grid, reason):
    with pytest.raises(RuntimeError, match=reason):
        _select("triton", qkv, heads, (grid,))


def test_what_the_kernels_can_just_serve(device):
    for grid in (RegionGrid.of_windows(64, 64, 64), RegionGrid.of_windows(2**15, 2**15, 2)):
        assert _select("triton", _projection(device=device), grids=(grid,)) == "triton"
    many = (RegionGrid.of_windows(65, 65, 65),) * 2  # allowed if the graph is given
    assert _select("triton", _projection(device=device), grids=many, routes=False) == "triton"


def test_padded_maps_on_amd_under_an_older_triton_are_refused(monkeypatch):
    """In that case Triton's compiler fails an assertion, which ends the process."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    padded = _Request(_projection(), grids=(RegionGrid.of_windows(4, 4, 3),))
    for version, refused in ((("3", "6"), True), (("3", "8"), False)):
        monkeypatch.setattr(availability, "_triton_version", lambda v=version: tuple(map(int, v)))
        assert bool(availability.why_not_triton(padded)) == refused
        assert availability.why_not_triton(_Request(_projection())) is None


def test_a_machine_without_triton_still_serves(monkeypatch):
    monkeypatch.setattr(availability, "TRITON_IS_INSTALLED", False)
    assert _select("auto", _projection()) == "torch"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        _select("triton", _projection())


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"backend must be one of \('auto', 'triton', 'torch', 'reference'\), got 'x'"
    ):
        _select("x", _projection())


def test_calls_are_requests():
    spec = AttentionSpec(dim=12, qk_dim=6, num_heads=3, n_win=2, topk=2)
    call = Call(qkv := torch.zeros(1, 3, 4, 24), spec)
    assert call.like is qkv
    assert (call.head_dims, call.grids, call.routes) == ((2, 4), (RegionGrid.of_windows(3, 4, 2),), True)
    grids = RegionGrid.of_windows(3, 4, 2), RegionGrid.of_windows(5, 4, 2)
    query, key, value = torch.zeros(1, 6, 3, 4), torch.zeros(1, 6, 5, 4), torch.zeros(1, 9, 5, 4)
    regional = RegionalCall(query, key, value, 1.0, torch.zeros(1, 3, 4, 2).int(), *grids, 3)
    assert regional.like is query
    assert (regional.head_dims, regional.grids, regional.routes) == ((2, 3), grids, False)


class TestFunctionalErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"qkv": torch.zeros(4, 4, 96)},
                r"qkv must be \(N, H, W, 2\*qk_dim \+ dim\), got shape \(4, 4, 96\)",
            ),
            (
                {"qkv": torch.zeros(1, 4, 4, 96, dtype=torch.int32)},
                r"qkv must be float32, .*torch.int32",
            ),
            ({"qkv": torch.zeros(1, 5, 4, 96)}, r"multiples of n_win=2, got 5 x 4"),
            ({"qkv": torch.zeros(1, 4, 4, 97)}, r"qk_dim must be given .* got 97"),
            ({"qk_dim": 48}, r"2\*qk_dim < 96, got 48"),
            ({"scale": float("nan")}, r"^scale must be a number from .*, got nan"),
            ({"lepe_weight": torch.zeros(32, 1, 2, 2)}, r"lepe_weight must be \(32, 1, k, k\) with k odd"),
            (
                {"lepe_weight": torch.zeros(32, 1, 3, 3), "lepe_bias": torch.zeros(3)},
                r"lepe_bias must be \(32,\)",
            ),
            ({"lepe_bias": torch.zeros(32)}, r"lepe_bias needs lepe_weight"),
            ({"padding": torch.zeros(32)}, r"padding must be \(96,\), got \(32,\)"),
            ({"router_weight": torch.zeros(32, 32)}, r"router_weight needs diff_routing=True"),
            (
                {"router_weight": torch.zeros(32, 3), "diff_routing": True},
                r"router_weight \(router.emb.weight\) must be \(32, 32\), got \(32, 3\)",
            ),
            ({"router_bias": torch.zeros(32)}, r"router_bias needs router_weight"),
            (
                {"kv_downsampling": downsampling.build("avgpool", 16, 32, ratio=2)},
                "kv_downsampling must be for qk_dim=32 and dim=32, got 16 and 32",
            ),
            ({"backend": "cuda"}, r"backend must be one of .*, got 'cuda'"),
        ],
    )
    @pytest.mark.parametrize("after", ["first", "after a good call"])
    def test_bad_arguments_are_named(self, after, change, message):
        """Also after a good call: then its signature is known, and known signatures are not checked again."""
        if after != "first":
            _call()
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                _call(**change)


def _call(**change):
    arguments = {"num_heads": 1, "n_win": 2, "topk": 2, "backend": "torch", **change}
    return functional.bi_level_routing_attention(arguments.pop("qkv", _projection()), **arguments)


class TestKnownSignatures:
    """A signature that passed the checks is not checked again; every other one is."""

    @pytest.fixture(autouse=True)
    def _none_known(self, monkeypatch):
        monkeypatch.setattr(functional, "_known", {})

    @staticmethod
    def _log(monkeypatch, of, name):
        calls, function = [], getattr(of, name)

        def log(*arguments):
            calls.append(arguments)
            return function(*arguments)

        monkeypatch.setattr(of, name, log)
        return calls

    def test_are_checked_once(self, monkeypatch):
        checks, selections = (
            self._log(monkeypatch, Call, "check"),
            self._log(monkeypatch, functional, "select"),
        )
        for _ in range(3):
            _call()
        assert len(checks) == len(selections) == 1
        _call(qkv=_projection(torch.float64))
        assert len(checks) == len(selections) == 2

    def test_another_size_has_settings_of_its_own(self):
        """The grid that is kept for a signature must not be used for a map of another size."""
        for size in ((4, 4), (4, 8), (8, 4), (4, 4)):
            qkv = torch.randn(1, *size, 96)
            assert torch.allclose(_call(qkv=qkv), _call(qkv=qkv, backend="reference"), atol=1e-5)

    def test_another_backend_is_selected_anew(self, monkeypatch, device):
        selections = self._log(monkeypatch, functional, "select")
        qkv = torch.randn(1, 4, 4, 96, device=device)
        outs = [_call(qkv=qkv, backend=name) for name in ("torch", "triton", "reference", "torch", "auto")]
        assert [name for name, _ in selections] == ["torch", "triton", "reference", "auto"]
        assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)

    def test_what_cannot_be_served_is_said_every_time(self):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"'triton' cannot serve: .* got torch.float64"):
                _call(qkv=_projection(torch.float64), backend="triton")

    def test_are_forgotten_when_there_are_too_many(self, monkeypatch):
        monkeypatch.setattr(functional, "_known", Bounded(3))
        for side in (2, 4, 6, 8, 10, 2):
            assert _call(qkv=torch.zeros(1, side, side, 96)).shape == (1, side, side, 32)
            assert len(functional._known) <= 3

    def test_in_many_threads(self, monkeypatch):
        monkeypatch.setattr(functional, "_known", Bounded(2))
        maps = [torch.randn(1, side, side, 96) for side in (2, 4, 6, 8)]
        expected, wrong = [_call(qkv=x) for x in maps], []

        def work():
            try:
                for x, y in [*zip(maps, expected, strict=True)] * 20:
                    if not torch.equal(_call(qkv=x), y):
                        wrong.append(x.shape)
            except Exception as error:  # else it would end only this thread
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
