"""`n_win=(rows, columns)`: square regions on maps that are not square, in both modules."""

import numpy as np
import pytest
import torch
from modules import run
from other_implementations import AuthorsNCHW
from problems import relative_error, worst
from torch import nn

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional

BACKENDS = ("reference", "torch")
NHWC, NCHW = BiLevelRoutingAttention, NCHWBiLevelRoutingAttention
# For the norm of the difference divided by the norm of the result; rounding of float32 gives 1 to 4e-7.
TOLERANCE = 1e-5


def _authors(n_win):
    """The authors' NCHW form by masked dense attention; on maps without padding both modules equal it."""
    lepe = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    return AuthorsNCHW(12, 2, n_win, 3, lepe)


def _ours(kind, authors, n_win, backend):
    """Our module with the same weights; in the NHWC module they have other names and no 1x1 kernels."""
    module = kind(12, 2, n_win, topk=3, backend=backend)
    state = authors.state_dict()
    if kind is NHWC:
        names = (("qkv_linear", "qkv.qkv"), ("output_linear", "wo"))
        for theirs, ours in names:
            for name in ("weight", "bias"):
                state[f"{ours}.{name}"] = state.pop(f"{theirs}.{name}").squeeze()
    module.load_state_dict(state)
    return module


def _clear_map(rows, columns, height, width):
    """An NCHW map whose regions have different means, so that float32 cannot choose other regions."""
    means = torch.randn(2, 12, rows, columns)
    for dim, side, count in ((2, height, rows), (3, width, columns)):
        means = means.repeat_interleave(-(-side // count), dim).narrow(dim, 0, side)
    return torch.randn(2, 12, height, width) + 2 * means


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [NHWC, NCHW])
def test_is_masked_dense_attention(kind, backend, device):
    """2 x 3 regions of 3 x 3 tokens; in a grid of 3 x 2 or 3 x 3 the regions would not be square."""
    authors = _authors((2, 3)).to(device)
    module = _ours(kind, authors, (2, 3), backend).to(device)
    x, grad_out = _clear_map(2, 3, 6, 9).to(device), torch.randn(2, 12, 6, 9, device=device)
    expected = run(authors, x, grad_out)
    is_nhwc = kind is NHWC
    actual = run(
        module,
        x,
        grad_out,
        (lambda x: module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) if is_nhwc else None,
    )
    assert relative_error(actual["out"], expected["out"].double()) < TOLERANCE
    assert relative_error(actual["x"], expected["x"].double()) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_goes_to_multiples_of_either_number(backend, device):
    """The reference pads before the projection: the same as padding a map by hand and cropping the output."""
    module = BiLevelRoutingAttention(12, 2, (2, 3), topk=3, auto_pad=True, backend=backend).to(device)
    x = _clear_map(2, 3, 5, 7).permute(0, 2, 3, 1).to(device)
    grad_out = torch.randn_like(x)
    actual = run(module, x, grad_out)
    by_hand = run(module, x, grad_out, lambda x: module(nn.functional.pad(x, (0, 0, 0, 2, 0, 1)))[:, :5, :7])
    assert worst(relative_error(actual[name], by_hand[name].double()) for name in actual) < TOLERANCE


@pytest.mark.parametrize("kind", [NHWC, NCHW])
def test_is_no_part_of_the_state_dict(kind):
    square, wide = kind(16, 2, 4), kind(16, 2, (5, 3))
    wide.load_state_dict(square.state_dict(), strict=True)


def test_may_come_as_a_list_and_of_numpys_integers():
    """Rows of a yaml hold lists."""
    for n_win in ([2, 3], (np.int64(2), np.uint8(3))):
        assert BiLevelRoutingAttention(16, 2, n_win).spec.n_win == (2, 3)
    assert BiLevelRoutingAttention(16, 2, (4, 4)).spec == BiLevelRoutingAttention(16, 2, 4).spec


def test_functions_take_pairs():
    qkv, numbers = torch.randn(1, 4, 9, 36), {"topk": 2, "backend": "torch"}
    outs = [
        functional.bi_level_routing_attention(qkv, num_heads=2, n_win=n_win, **numbers)
        for n_win in ([2, 3], (2, 3))
    ]
    assert torch.equal(*outs)
    assert functional.region_routing(qkv, n_win=(2, 3), **numbers)[1].shape == (1, 6, 2)


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match=r"topk must be at most .* regions, 6 for n_win=\(2, 3\), got 7"):
        BiLevelRoutingAttention(16, 2, (2, 3), topk=7)
    with pytest.raises(ValueError, match=r"n_win must be two ints of at least 1, got \(2, 0\)"):
        BiLevelRoutingAttention(16, 2, (2, 0))
    with pytest.raises(ValueError, match=r"multiples of n_win=\(2, 3\), got 6 x 8"):
        BiLevelRoutingAttention(16, 2, (2, 3))(torch.randn(1, 6, 8, 16))
    with pytest.raises(ValueError, match=r"at least 2 x 3 tokens \(n_win\), got 6 x 2"):
        NCHWBiLevelRoutingAttention(16, 2, (2, 3))(torch.randn(1, 16, 6, 2))
