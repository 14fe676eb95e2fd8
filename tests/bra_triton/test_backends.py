"""Which backend serves, and what is said when one cannot."""

import logging

import pytest
import torch

from bra_triton import functional
from bra_triton.backend import availability, registry
from bra_triton.spec import AttentionSpec

SPEC = AttentionSpec(32, 32, 1, 2, 2)


def _projection(dtype=torch.float32, channels=96, device="cpu"):
    return torch.zeros(1, 4, 4, channels, dtype=dtype, device=device)


def test_auto_takes_triton_where_it_can(device):
    assert registry.select("auto", _projection(device=device), SPEC) == "triton"


def test_auto_takes_torch_for_float64_and_says_why(device, caplog):
    registry._logged.clear()
    with caplog.at_level(logging.INFO, logger="bra_triton"):
        assert registry.select("auto", _projection(torch.float64, device=device), SPEC) == "torch"
    assert (
        "'triton' is passed over: dtype must be float32, float16 or bfloat16, got torch.float64"
        in caplog.text
    )


def test_cpu_tensors_without_the_interpreter_take_torch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert registry.select("auto", _projection(), SPEC) == "torch"
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot serve: tensors on the CPU need TRITON_INTERPRET=1"
    ):
        registry.select("triton", _projection(), SPEC)


@pytest.mark.parametrize(
    ("qkv", "spec", "reason"),
    [
        (_projection(torch.float64), SPEC, "got torch.float64"),
        (_projection(device="meta"), SPEC, "not on 'meta'"),
        (_projection(), AttentionSpec(257, 257, 1, 2, 2), "at most 256 wide, got 257"),
        (_projection(), AttentionSpec(32, 32, 1, 65, 2), "n_win must be at most 64, got 65"),
    ],
)
def test_what_the_kernels_cannot_serve_is_named(qkv, spec, reason):
    with pytest.raises(RuntimeError, match=reason):
        registry.select("triton", qkv, spec)


def test_an_image_whose_tokens_pass_32_bits_is_refused():
    qkv = torch.zeros(1, 1, 1, 1).expand(1, 2**16, 2**15, 16)
    reason = availability.why_not_triton(qkv, AttentionSpec(8, 4, 1, 2, 2))
    assert reason is not None
    assert "fewer than 2**31 tokens" in reason
    assert availability.why_not_triton(qkv[:, : 2**15], AttentionSpec(8, 4, 1, 2, 2)) is None


def test_padded_maps_on_amd_under_an_older_triton_are_refused(monkeypatch):
    """There the compiler dies of an assertion, and takes the process with it."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    spec = AttentionSpec(32, 32, 1, 3, 2)
    for version, refused in ((("3", "6"), True), (("3", "8"), False)):
        monkeypatch.setattr(availability, "_triton_version", lambda v=version: tuple(map(int, v)))
        assert bool(availability.why_not_triton(_projection(), spec)) == refused
        assert availability.why_not_triton(_projection(), SPEC) is None


def test_a_machine_without_triton_still_serves(monkeypatch):
    monkeypatch.setattr(availability, "TRITON_IS_INSTALLED", False)
    assert registry.select("auto", _projection(), SPEC) == "torch"
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        registry.select("triton", _projection(), SPEC)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"backend must be one of \('auto', 'triton', 'torch', 'reference'\), got 'x'"
    ):
        registry.select("x", _projection(), SPEC)


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
