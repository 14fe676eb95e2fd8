"""Where the reference gives NaN or infinity, so does every backend, in every dtype: a loss then shows it."""

from contextlib import nullcontext
from math import inf, nan

import pretended
import pytest
import torch

from bra_triton import functional
from bra_triton.backend.torch import chunks, masked

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPOILT = {
    # Place and value in a packed projection of 16 query channels, 16 key channels and values; in one token or
    # in all (`...`).
    "infinite key": ((0, 3, 3, 16), inf),
    "keys of minus infinity": ((..., 16), -inf),
    "one key of minus infinity": ((0, 3, 3, 16), -inf),
    "NaN key": ((0, 3, 3, 16), nan),
    "infinite query": ((0, 3, 3, 0), inf),
    "NaN query": ((0, 3, 3, 0), nan),
    "infinite value": ((0, 3, 3, 40), inf),
    "NaN value": ((0, 3, 3, 40), nan),
}
# Channels of the projection. With 48, keys and values are equally wide, which PyTorch's flash attention for
# the CPU needs; with 56 they are not.
WIDTHS = (48, 56)


def _kinds(spoilt, width, dtype, backend, device, batch=1):
    """For each number of the output and of the projection's gradient: 0 if finite, 1 if infinite, 2 if NaN.

    Only the last image is spoilt.
    """
    qkv = torch.randn(batch, 8, 8, width, device=device, generator=torch.Generator(device).manual_seed(0))
    qkv[..., 0] = 1
    place, value = SPOILT[spoilt]
    qkv[-1:][place] = value
    qkv = qkv.to(dtype).requires_grad_()
    out = functional.bi_level_routing_attention(
        qkv, num_heads=1, n_win=2, topk=2, qk_dim=16, scale=0.25, backend=backend
    )
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    return [x.isinf() + 2 * x.isnan() for x in (out, gradient)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("path", [nullcontext, pretended.nvidia])
def test_the_torch_backend_shows_what_the_definition_shows(spoilt, width, dtype, path, device, monkeypatch):
    monkeypatch.setattr(masked, "_BYTES_A_CHOICE", 0)  # nothing is masked on NVIDIA
    expected = _kinds(spoilt, width, dtype, "reference", device)
    with path():
        actual = _kinds(spoilt, width, dtype, "torch", device)
    assert torch.equal(actual[0], expected[0])
    # In gradients NaN and infinity are not told apart: which of them a sum of infinities gives may depend on
    # the order of additions.
    assert torch.equal(actual[1] > 0, expected[1] > 0)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spoilt", SPOILT)
def test_under_a_mask_on_nvidia_nothing_that_the_definition_shows_is_hidden(spoilt, width, dtype, device):
    """More rows may show it there, as the mask multiplies what was not chosen by 0."""
    expected = _kinds(spoilt, width, dtype, "reference", device)
    with pretended.nvidia():
        actual = _kinds(spoilt, width, dtype, "torch", device)
    for found, wanted in zip(actual, expected, strict=True):
        assert (found > 0)[wanted > 0].all()


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("spoilt", [name for name in SPOILT if name != "one key of minus infinity"])
def test_the_last_of_three_images_shows_it_and_no_other(spoilt, is_masked, monkeypatch):
    """The CPU computes one image at a time here, but checks the softmax once for all images."""
    monkeypatch.setattr(masked, "is_cheaper", lambda *_: is_masked)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 8 * 8 * 8 * 8)
    actual, expected = (
        _kinds(spoilt, 48, torch.float32, backend, torch.device("cpu"), batch=3)
        for backend in ("torch", "reference")
    )
    assert expected[0][2].any()
    assert not expected[0][:2].any()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1] > 0, expected[1] > 0)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("spoilt", ["infinite key", "NaN key", "infinite query", "NaN query", "NaN value"])
def test_the_kernels_report_nan(spoilt, dtype, device):
    (out, _), (expected, _) = (
        _kinds(spoilt, 48, dtype, backend, device) for backend in ("triton", "reference")
    )
    assert torch.equal(out == 2, expected == 2)
