"""Exponentials by multiply-adds: alone, and in the kernels that take them."""

import math

import pytest
import torch
import triton
import triton.language as tl
from attention_parts import PARTS, compare, make
from problems import worst

from bra_triton.kernels import forms, tiles
from bra_triton.kernels.lib.exponential import exp2
from bra_triton.kernels.tiles import FORWARD, QUERY_GRADIENT, Tile

ROWS, COLUMNS = 16, 64
HALVES = (torch.float16, torch.bfloat16)
# The largest relative error: 7.5e-5 of the polynomial of degree 3, and 3e-7 of float32's rounding.
POLYNOMIAL_ERROR = 7.6e-5


@triton.jit
def _exp2_of_tile(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARE: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + place, exp2(tl.load(x + place), SHARE))


def _evaluate(x, share):
    out = torch.empty_like(x)
    _exp2_of_tile[(1,)](x, out, ROWS, COLUMNS, SHARE=share)
    return out


@pytest.mark.parametrize("share", [0, 1, 2, 4, 8])
def test_every_column_is_its_own_power_and_one_in_share_is_a_polynomial(share, device):
    """Arguments as in a softmax: from a little above 0 (by rounding) to where float32's normal powers end."""
    x = torch.empty(ROWS, COLUMNS, device=device).uniform_(-20, 0.01)
    x[0], x[1], x[2] = -125.9, 0, torch.arange(COLUMNS, device=device) / -2
    exact = x.double().exp2()
    errors = ((_evaluate(x, share).double() - exact) / exact).abs()
    first = COLUMNS - COLUMNS // share if share else COLUMNS
    assert errors[:, :first].max() < 3e-7 if first else True
    if share:
        assert 1e-5 < errors[:, first:].max() < POLYNOMIAL_ERROR


def test_far_below_zero_is_next_to_nothing(device):
    x = torch.full((ROWS, COLUMNS), -1e4, device=device)
    x[0] = -math.inf
    assert (_evaluate(x, 1) <= 2**-125).all()


def test_what_is_no_number_does_not_pass_for_a_probability(device):
    """If training diverges, NaN must not become a probability: the model should report it."""
    powers = _evaluate(torch.full((ROWS, COLUMNS), math.nan, device=device), 1)
    assert (powers.isnan() | (powers.abs() > 1e30)).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("packed", dtype) for dtype in HALVES), ("soft", torch.float16), ("masked_padding", torch.float16)],
)
def test_attention_stays_within_half_precisions_rounding(name, dtype, device, monkeypatch):
    """Half of the columns use the polynomial, more than in any table; the tolerance is as without it."""
    part = PARTS[name]
    monkeypatch.setattr(forms, "masked_is_cheaper", lambda problem: part.masked)
    shared = Tile(16, 32, 1, 1, exp_share=2)
    changed = {FORWARD: shared, QUERY_GRADIENT: shared}
    monkeypatch.setattr(tiles, "MASKED_TILES", tiles.MASKED_TILES | changed)
    with tiles.use_tiles(changed):
        problem = make(part, device, dtype)
        errors = compare("triton", problem, part.needs_factor)
    assert worst(errors.values()) < 4 * torch.finfo(dtype).eps, errors


def test_attention_does_take_them(device):
    """In float32 the polynomial's error is visible; otherwise the test above would prove nothing."""
    problem = make(PARTS["packed"], device)
    results = []
    for share in (0, 2):
        tile = Tile(16, 32, 1, 1, exp_share=share)
        with tiles.use_tiles({FORWARD: tile, QUERY_GRADIENT: tile}):
            results.append(compare("triton", problem, needs_factor=False))
    exact, shared = results
    assert exact["out"] < 5e-6 < shared["out"]
    assert exact["query"] < 5e-6 < shared["query"]
