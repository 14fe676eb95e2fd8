"""Which backend serves, and what is said when one cannot."""

import logging

import pytest
import torch

from bra_triton import functional
from bra_triton.backend import availability, registry
from bra_triton.kernels.grid import RegionGrid

HEADS, GRIDS = (32, 32), [RegionGrid.of_windows(4, 4, 2)]


def _projection(dtype=torch.float32, channels=96, device="cpu"):
    return torch.zeros(1, 4, 4, channels, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def _cpu_tensors_are_served(monkeypatch):
    """Or, where there is a GPU, "needs the interpreter" would come before the reason asked for."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_auto_takes_triton_where_it_can(device):
    assert registry.select("auto", _projection(device=device), HEADS, GRIDS) == "triton"


def test_auto_takes_torch_for_float64_and_says_why(device, caplog):
    registry._logged.clear()
    with caplog.at_level(logging.INFO, logger="bra_triton"):
        assert registry.select("auto", _projection(torch.float64, device=device), HEADS, GRIDS) == "torch"
    assert (
        "'triton' is passed over: dtype must be float32, float16 or bfloat16, got torch.float64"
        in caplog.text
    )


def test_cpu_tensors_without_the_interpreter_take_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert registry.select("auto", _projection(), HEADS, GRIDS) == "torch"
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot serve: tensors on the CPU need TRITON_INTERPRET=1"
    ):
        registry.select("triton", _projection(), HEADS, GRIDS)


@pytest.mark.parametrize(
    ("qkv", "heads", "grid", "reason"),
    [
        (_projection(torch.float64), HEADS, GRIDS[0], "got torch.float64"),
        (_projection(device="meta"), HEADS, GRIDS[0], "not on 'meta'"),
        (_projection(), (257, 257), GRIDS[0], "at most 256 wide, got 257"),
        (
            *(_projection(), HEADS, RegionGrid.of_windows(130, 65, 65)),
            "at most 4096 regions, got 130 x 65 tokens in 65 x 65 regions; lower n_win",
        ),
        (
            *(_projection(), HEADS, RegionGrid.of_windows(2**16, 2**15, 2)),
            r"fewer than 2\*\*31 tokens, got 65536 x 32768",
        ),
    ],
)
def test_what_the_kernels_cannot_serve_is_named(qkv, heads, grid, reason):
    with pytest.raises(RuntimeError, match=reason):
        registry.select("triton", qkv, heads, [grid])


def test_what_the_kernels_can_just_serve(device):
    for grid in (RegionGrid.of_windows(64, 64, 64), RegionGrid.of_windows(2**15, 2**15, 2)):
        assert registry.select("triton", _projection(device=device), HEADS, [grid]) == "triton"
    many = [RegionGrid.of_windows(65, 65, 65)] * 2  # of a graph that is given
    assert registry.select("triton", _projection(device=device), HEADS, many, routes=False) == "triton"


def test_padded_maps_on_amd_under_an_older_triton_are_refused(monkeypatch):
    """There the compiler dies of an assertion, and takes the process with it."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    padded = [RegionGrid.of_windows(4, 4, 3)]
    for version, refused in ((("3", "6"), True), (("3", "8"), False)):
        monkeypatch.setattr(availability, "_triton_version", lambda v=version: tuple(map(int, v)))
        assert bool(availability.why_not_triton(_projection(), HEADS, padded, True)) == refused
        assert availability.why_not_triton(_projection(), HEADS, GRIDS, True) is None


def test_a_machine_without_triton_still_serves(monkeypatch):
    monkeypatch.setattr(availability, "TRITON_IS_INSTALLED", False)
    assert registry.select("auto", _projection(), HEADS, GRIDS) == "torch"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        registry.select("triton", _projection(), HEADS, GRIDS)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"backend must be one of \('auto', 'triton', 'torch', 'reference'\), got 'x'"
    ):
        registry.select("x", _projection(), HEADS, GRIDS)


class TestFunctionalErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"qkv": torch.zeros(4, 4, 96)},
                r"qkv must be \(N, H, W, 2\*qk_dim \+ dim\), got shape \(4, 4, 96\)",
            ),
            ({"qkv": torch.zeros(1, 4, 4, 96, dtype=torch.int32)}, r"floating dtype, got torch.int32"),
            ({"qkv": torch.zeros(1, 5, 4, 96)}, r"multiples of n_win=2, got 5 x 4"),
            ({"qkv": torch.zeros(1, 4, 4, 97)}, r"qk_dim must be given .* got 97"),
            ({"qk_dim": 48}, r"2\*qk_dim < 96, got 48"),
            ({"scale": float("nan")}, r"qk_scale must be positive and finite, got nan"),
            ({"lepe_weight": torch.zeros(32, 1, 2, 2)}, r"lepe_weight must be \(32, 1, k, k\) with k odd"),
            (
                {"lepe_weight": torch.zeros(32, 1, 3, 3), "lepe_bias": torch.zeros(3)},
                r"lepe_bias must be \(32,\)",
            ),
            ({"lepe_bias": torch.zeros(32)}, r"lepe_bias needs lepe_weight"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        arguments = {
            "qkv": _projection(),
            "num_heads": 1,
            "n_win": 2,
            "topk": 2,
            "backend": "torch",
            **change,
        }
        with pytest.raises(ValueError, match=message):
            functional.bi_level_routing_attention(arguments.pop("qkv"), **arguments)
