"""Every public argument of modules and functions with bad values: each raises an error that names it."""

import ast
import os
import re
import traceback
from decimal import Decimal
from math import inf, nan
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bra_triton
from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, functional, regional_call
from bra_triton.kernels.grid import RegionGrid
from bra_triton.modules import downsampling
from bra_triton.modules.tokens import TokenBiLevelRoutingAttention
from bra_triton.spec import AttentionSpec

ERRORS = (ValueError, TypeError, RuntimeError, AttributeError)
MAP = torch.randn(1, 4, 4, 16)
NCHW_MAP = MAP.permute(0, 3, 1, 2)
TOKENS = MAP.flatten(1, 2)
PACKED = {"qkv": torch.randn(1, 4, 4, 48), "n_win": 2, "topk": 2, "backend": "torch"}
CONV = {"kv_downsample_mode": "conv", "kv_downsample_ratio": 2}


NUMBERS = {"dim": 16, "num_heads": 2, "n_win": 2, "topk": 2}


def _nhwc(x=MAP, **arguments):
    return BiLevelRoutingAttention(**{**NUMBERS, "backend": "torch", **arguments})(x)


def _nchw(x=NCHW_MAP, **arguments):
    chosen = {} if "attn_backend" in arguments else {"backend": "torch"}
    return NCHWBiLevelRoutingAttention(**{**NUMBERS, **chosen, **arguments})(x)


def _tokens(x=TOKENS, size=None, **arguments):
    return TokenBiLevelRoutingAttention(**NUMBERS, backend="torch", size=size)(x, **arguments)


def _inspect(kind=BiLevelRoutingAttention, x=MAP, **named):
    return kind(**NUMBERS)(x, **named)


def _attend(**arguments):
    return functional.bi_level_routing_attention(**{**PACKED, "num_heads": 2, **arguments})


def _route(**arguments):
    return functional.region_routing(**{**PACKED, **arguments})


def _regional(**arguments):
    maps = dict(zip(("query", "key", "value"), torch.randn(3, 1, 8, 4, 4), strict=True))
    graph = torch.zeros(1, 2, 4, 1, dtype=torch.int64)
    numbers = {"scale": 0.3, "region_graph": graph, "region_size": (2, 2)}
    return functional.regional_routing_attention(**{**maps, **numbers, **arguments})[0]


def _asked(**environment):
    with mock.patch.object(os, "environ", {name: str(value) for name, value in environment.items()}):
        regional_call._is_asked_for()


def _build(pool_on=None, **arguments):
    module = downsampling.build(**{"mode": "avgpool", "ratio": 2, "qk_dim": 4, "dim": 4, **arguments})
    return module.pool(
        torch.zeros(1, 4, 4, 12, device=pool_on), RegionGrid.of_windows(4, 4, 2), backend="torch"
    )


def _set(kind=BiLevelRoutingAttention, **attribute):
    module = kind(16, 2, 2, topk=2)
    for name, value in attribute.items():
        setattr(module, name, value)


def _reduced(**attribute):
    for name, value in attribute.items():
        setattr(downsampling.build("avgpool", 16, 16), name, value)


def _called(**layer):
    module = BiLevelRoutingAttention(16, 2, 2, topk=2, backend="torch")
    for name, value in layer.items():
        setattr(module, name, value)
    module(MAP)


def _routed_by(emb, **flags):
    module = BiLevelRoutingAttention(16, 2, 2, topk=2, backend="torch", **flags)
    module.router.emb = emb
    module(MAP)


def _traced(attention):
    return attention(BiLevelRoutingAttention(16, 2, 2, topk=2))


# Bad values. Some equal a good value but have another type; others only look like a good value.
NOT_WHOLE = (0, -1, 2.0, 2.5, True, False, "2", None, nan, inf, (2,), [2], torch.tensor(2), np.array([2, 2]))
NOT_FLAGS = (2, None, "yes", 0.5, [], torch.tensor(True), np.array([1, 0]))
NOT_SCALES = (
    *(0, 0.0, nan, inf, -inf, 3e38, -3e38, 10**400, True, "1", 1j, [1.0], Decimal(1), np.array([1.0, 2.0])),
    *(torch.tensor(0.5), torch.randn(2), nn.Parameter(torch.ones(()))),
)
NOT_NAMES = ("cuda", "", None, 1, ["torch"], {}, np.array(["torch", "auto"]), nn.Identity())
NOT_SIZES = (
    2,
    "22",
    (2,),
    (2, None),
    (2, 0),
    (2.0, 2),
    (True, 2),
    (2, "2"),
    {2, 3},
    (2, 2, 2),
    torch.ones(2),
)


def _not_tensors(*shape):
    x = torch.ones(shape)
    others = (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn)
    return (
        *(x.to(dtype) for dtype in others),
        *(x.to_sparse(), x[None], torch.ones(()), x.tolist(), x.numpy(), 1.0, "x", object()),
    )


def _not_beside_others(*shape):
    return *_not_tensors(*shape), torch.ones(shape)[..., :-1], torch.ones(shape, device="meta")


def _without(values, *allowed):
    return tuple(x for x in values if not any(x is a for a in allowed))


MAPS_OF = ((_nhwc, MAP), (_nchw, NCHW_MAP), (_tokens, TOKENS))
# Rows: the call, an argument, bad values for it, and other arguments without which it would not be used.
TABLE = [
    *((_nhwc, name, NOT_WHOLE, {}) for name in ("dim", "num_heads", "n_win", "topk")),
    (_nhwc, "qk_dim", _without(NOT_WHOLE, None), {}),
    *((_nhwc, name, NOT_FLAGS, {}) for name in ("param_routing", "diff_routing", "soft_routing", "auto_pad")),
    (_nhwc, "num_heads", (3,), {}),
    (_nhwc, "topk", (5,), {}),
    (_nhwc, "qk_scale", NOT_SCALES, {}),
    (_nhwc, "side_dwconv", (2, -1, 3.0, True, None, "3", [3], nan), {}),
    (_nhwc, "kv_per_win", NOT_WHOLE, {"kv_downsample_mode": "ada_avgpool"}),
    *(
        (_nhwc, "kv_downsample_ratio", values, {"kv_downsample_mode": mode})
        for mode, values in (
            ("avgpool", (0, 0.5, 2.5, 3, nan, inf, None, "2", True, [2], 1j)),
            ("maxpool", (-1, None)),
            ("fracpool", (0.5, nan, inf, None, "2", True)),
            ("conv", (0, 2.5, None)),
        )
    ),
    (_nhwc, "kv_downsample_kernel", _without(NOT_WHOLE, None), CONV),
    (_nhwc, "kv_downsample_kernel", (0, 2.5, True, "2", 3), {"kv_downsample_mode": "fracpool"}),
    (_nhwc, "kv_downsample_kernel", (3,), CONV),
    (_nhwc, "kv_downsample_mode", ("mean", None, 3, ["conv"], np.array(["conv", "conv"])), {}),
    (_nhwc, "param_attention", ("none", None, 3, ["qkv"], np.array(["qkv", "qkvo"])), {}),
    (_nhwc, "param_routing", (True,), {"diff_routing": False}),
    (_nhwc, "backend", NOT_NAMES, {}),
    (_nhwc, "x", _not_tensors(1, 4, 4, 16), {}),
    *((call, "x", (x.to_mkldnn(), torch.nested.nested_tensor([*x])), {}) for call, x in MAPS_OF),
    (_nhwc, "x", (torch.ones(1, 4, 4, 16).half(), torch.ones(1, 4, 4, 16).double()), {}),
    *((_nchw, name, NOT_WHOLE, {}) for name in ("dim", "num_heads", "n_win", "topk")),
    (_nchw, "n_win", (5,), {}),
    (_nchw, "qk_scale", NOT_SCALES, {}),
    (_nchw, "side_dwconv", (2, -1, 3.0, True, None, "3", [3], nan), {}),
    (_nchw, "auto_pad", NOT_FLAGS, {}),
    (_nchw, "attn_backend", ("cuda", "auto", "reference", 1, ["torch"]), {}),
    (_nchw, "attn_backend", ("triton",), {"backend": "torch"}),
    (_nchw, "backend", NOT_NAMES, {}),
    (_nchw, "x", (*_not_tensors(1, 16, 4, 4), torch.ones(1, 16, 4, 4).half()), {}),
    (_inspect, "ret_attn_mask", (*NOT_FLAGS, 13, torch.ones(4, 4)), {}),
    (_inspect, "ret_attn_mask", (*NOT_FLAGS, 13), {"kind": NCHWBiLevelRoutingAttention, "x": NCHW_MAP}),
    (_tokens, "ret_attn_mask", (*NOT_FLAGS, 13), {}),
    (_tokens, "x", (*_not_tensors(1, 16, 16), torch.ones(1, 17, 16)), {}),
    (_tokens, "size", NOT_SIZES, {}),
    (_tokens, "attn_mask", (torch.ones(16, 16), False), {}),
    (_tokens, "is_causal", (True, *NOT_FLAGS), {}),
    (_attend, "num_heads", NOT_WHOLE, {}),
    *((call, name, NOT_WHOLE, {}) for call in (_attend, _route) for name in ("n_win", "topk")),
    *((call, "qk_dim", (*_without(NOT_WHOLE, None), 24), {}) for call in (_attend, _route)),
    *((call, "scale", NOT_SCALES, {}) for call in (_attend, _route)),
    *((call, "diff_routing", NOT_FLAGS, {}) for call in (_attend, _route)),
    (_attend, "soft_routing", NOT_FLAGS, {}),
    *((call, "backend", NOT_NAMES, {}) for call in (_attend, _route, _regional)),
    *((call, "qkv", _not_tensors(1, 4, 4, 48), {}) for call in (_attend, _route)),
    *((call, "qkv", (torch.ones(1, 4, 4, 47),), {}) for call in (_attend, _route)),
    *((call, "backend", ("triton",), {"qkv": PACKED["qkv"].double()}) for call in (_attend, _route)),
    *((call, "padding", _not_beside_others(48), {}) for call in (_attend, _route)),
    *(
        (call, "router_weight", _not_beside_others(16, 16), {"diff_routing": True})
        for call in (_attend, _route)
    ),
    *((call, "router_weight", (torch.ones(16, 16),), {}) for call in (_attend, _route)),
    *(
        (
            call,
            "router_bias",
            _not_beside_others(16),
            {"diff_routing": True, "router_weight": torch.ones(16, 16)},
        )
        for call in (_attend, _route)
    ),
    (_attend, "router_bias", (torch.ones(16),), {}),
    (_attend, "lepe_weight", (*_not_beside_others(16, 1, 3, 3), torch.ones(16, 1, 2, 2)), {}),
    (_attend, "lepe_bias", _not_beside_others(16), {"lepe_weight": torch.ones(16, 1, 3, 3)}),
    (_attend, "lepe_bias", (torch.ones(16),), {}),
    (_attend, "kv_downsampling", ("avgpool", nn.AvgPool2d(2), 2, torch.ones(2)), {}),
    (_attend, "kv_downsampling", (downsampling.build("avgpool", 8, 16, ratio=2),), {}),
    (_attend, "kv_downsampling", (downsampling.build("conv", 16, 16, ratio=2).to("meta"),), {}),
    (_attend, "qkv", (torch.nested.nested_tensor([torch.ones(4, 4, 48)]),), {}),
    (_regional, "query", (*_not_tensors(1, 8, 4, 4), torch.nested.nested_tensor([torch.ones(8, 4, 4)])), {}),
    *((_regional, name, (torch.ones(1, 8, 0, 4), torch.ones(1, 8, 4, 0)), {}) for name in ("query", "key")),
    *((_regional, name, _not_beside_others(1, 8, 4, 4), {}) for name in ("key", "value")),
    *((_regional, name, (torch.ones(1, 8, 4, 4).half(), None), {}) for name in ("key", "value")),
    (_regional, "key", (torch.ones(1, 6, 4, 4), torch.ones(2, 8, 4, 4)), {}),
    (_regional, "scale", NOT_SCALES, {}),
    *((_regional, name, NOT_SIZES, {}) for name in ("region_size", "kv_region_size")),
    (_regional, "region_size", ((3, 3),), {"auto_pad": False}),
    *((_regional, name, NOT_FLAGS, {}) for name in ("auto_pad", "ret_attn_mask")),
    (
        _regional,
        "region_graph",
        (
            *(None, [[[[0]]]], np.zeros((1, 2, 4, 1), np.int64), torch.zeros(1, 2, 4, 1)),
            *(torch.zeros(1, 2, 4, 1, dtype=dtype) for dtype in (torch.int16, torch.uint8, torch.bool)),
            *(
                torch.zeros(shape).long()
                for shape in ((), (1, 2, 4), (2, 2, 4, 1), (1, 2, 5, 1), (1, 3, 4, 1))
            ),
            *(torch.zeros(shape).long() for shape in ((1, 2, 4, 0), (1, 2, 4, 5), (1, 0, 4, 1))),
            *(torch.full((1, 2, 4, 1), 4), torch.zeros(1, 2, 4, 1, device="meta").long()),
        ),
        {},
    ),
    (_asked, "BRA_TRITON_CHECK", ("true", "2", " 1"), {}),
    *((_build, name, NOT_WHOLE, {}) for name in ("qk_dim", "dim")),
    (_build, "mode", ("mean", None), {}),
    *((_set, name, NOT_WHOLE, {}) for name in ("n_win", "num_heads", "topk")),
    *((_set, name, NOT_FLAGS, {}) for name in ("soft_routing", "diff_routing", "auto_pad")),
    (_set, "scale", NOT_SCALES, {}),
    (_set, "scale", (nn.Parameter(torch.ones(())),), {"kind": NCHWBiLevelRoutingAttention}),
    (_set, "topk", (5,), {}),
    (_set, "dim", (16, nn.Parameter(torch.ones(()))), {}),
    (_set, "backend", NOT_NAMES, {}),
    (_set, "lepe", (torch.zeros_like, "lepe"), {}),
    (_set, "spec", (None, 2, AttentionSpec(24, 24, 2, 2, 2)), {}),
    (_reduced, "ratio", (2, 0, None, "2"), {}),
    (_called, "lepe", (nn.Conv2d(16, 16, 3), nn.Linear(2, 2)), {}),
    (_called, "qkv", (nn.Linear(16, 32), nn.Linear(2, 2)), {}),
    (_called, "wo", (nn.Linear(2, 2),), {}),
    (_routed_by, "emb", (nn.Sequential(nn.Linear(16, 16)), None, torch.zeros_like), {}),
    (_routed_by, "emb", (nn.Sequential(nn.Linear(16, 32)), nn.Linear(16, 32)), {"diff_routing": True}),
    (_traced, "attention", (torch.fx.symbolic_trace, torch.jit.script), {}),
]
# Arguments that the error message calls by another name.
NAMES = {(_build, "mode"): "kv_downsample_mode"}
ROWS = [(call, name, value, others) for call, name, values, others in TABLE for value in values]


def _error_of(call, name, value, others):
    with pytest.raises(ERRORS) as raised:
        call(**{name: value}, **others)
    return raised


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0].__name__}-{row[1]}")
def test_what_an_argument_must_not_be_is_refused_by_its_name(row):
    """Also after a good call: then its signature is known, and known signatures are not checked again."""
    call, name, values, others = row
    if call in (_attend, _route):
        call()
    for value in values:
        message = str(_error_of(call, name, value, others).value)
        assert re.search(rf"\b{NAMES.get((call, name), name)}\b", message), (value, message)


@pytest.mark.parametrize("call", [_attend, _route])
def test_a_tensor_of_another_kind_is_no_known_one(call):
    good = {"padding": torch.ones(48), "router_weight": torch.ones(16, 16), "router_bias": torch.ones(16)}
    if call is _attend:
        good |= {"lepe_weight": torch.ones(16, 1, 3, 3), "lepe_bias": torch.ones(16)}
    call(**good, diff_routing=True)
    for name, x in good.items():
        for other in (x.long(), x.cfloat(), x.to("meta"), x.to_sparse()):
            with pytest.raises(ValueError, match=name):
                call(**good | {name: other}, diff_routing=True)


OTHER_ERRORS = "AssertionError|ModuleNotFoundError"


def test_every_guard_fires():
    """`TABLE` reaches every `raise` statement that checks an argument."""
    fired = set()
    for row in ROWS:
        error = _error_of(*row).value
        while error is not None:  # an error may name the map in place of one that knew a region's side alone
            place = traceback.extract_tb(error.__traceback__)[-1]
            fired.add((Path(place.filename).name, place.lineno))
            error = error.__context__
    folder = Path(bra_triton.__file__).parent
    missed, guards = [], 0
    files = (
        "arguments.py spec.py call.py regional_call.py functional.py modules/*.py backend/select.py".split()
    )
    for file in (found for pattern in files for found in folder.glob(pattern)):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and node.exc and not re.search(OTHER_ERRORS, ast.dump(node.exc)):
                guards += 1
                lines = range(node.lineno, node.end_lineno + 1)
                if not any((file.name, line) in fired for line in lines):
                    missed.append(f"{file.name}:{node.lineno}")
    assert not missed, f"{len(missed)} of {guards} guards did not fire: {missed}"


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-8, 8),
    st.floats(),
    st.complex_numbers(),
    st.fractions(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.floats(), max_size=2),
    st.dictionaries(st.text(max_size=1), st.none(), max_size=1),
    st.tuples(st.integers(-8, 0), st.none() | st.floats() | st.integers(-8, 8)),
    st.sampled_from(
        [np.float32(2.5), np.bool_(True), np.arange(2), nn.Identity, nn.Linear(2, 2), object(), len]
    ),
    st.builds(
        lambda shape, dtype, device: torch.ones(shape, device=device).to(dtype),
        st.sampled_from([(), (1,), (16,), (1, 4, 4), (1, 4, 4, 1), (2, 1, 3, 2), (2, 2, 2, 2, 2)]),
        st.sampled_from(
            [torch.float32, torch.float16, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2]
        ),
        st.sampled_from(["cpu", "meta"]),
    ),
)
ARGUMENTS = sorted({(call.__name__, name) for call, name, *_ in TABLE if call is not _traced})


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(ARGUMENTS), JUNK)
def test_junk_is_taken_or_refused_by_name(argument, junk):
    call, name = globals()[argument[0]], argument[1]
    try:
        call(**{name: junk})
    except ERRORS as error:
        message = str(error)
    else:
        return
    assert re.search(rf"\b{NAMES.get((call, name), name)}\b", message), (argument, junk, message)


INTEGERS = [np.int64, np.int32, np.uint8]


@pytest.mark.parametrize("whole", INTEGERS)
def test_numpys_integers_serve(whole):
    """NumPy's integers give the same results as ints, and a specification stores them as ints."""
    numbers = {"dim": 16, "num_heads": 2, "n_win": 2, "topk": 2, "side_dwconv": 5}
    pooled = {"qk_dim": 8, "kv_per_win": 2, "kv_downsample_mode": "ada_avgpool"}
    kernel = {"kv_downsample_mode": "conv", "kv_downsample_ratio": 2, "kv_downsample_kernel": 1}
    for call, arguments in (
        (_nhwc, numbers | pooled),
        (_nhwc, numbers | kernel),
        (_nchw, numbers),
        (_attend, {"num_heads": 2, "n_win": 2, "topk": 2, "qk_dim": 8}),
        (_route, {"n_win": 2, "topk": 2, "qk_dim": 8}),
    ):
        theirs = {k: whole(v) if isinstance(v, int) else v for k, v in arguments.items()}
        results = []
        for each in (arguments, theirs):
            torch.manual_seed(0)
            result = call(**each)
            results.append(result if torch.is_tensor(result) else result[0])
        assert torch.equal(*results)
    assert _regional(region_size=(whole(2), whole(2)), kv_region_size=[whole(1), whole(4)]).shape == (
        1,
        8,
        4,
        4,
    )
    spec = BiLevelRoutingAttention(**{k: whole(v) for k, v in numbers.items()}, qk_scale=np.float32(0.5)).spec
    assert {type(x) for x in (spec.dim, spec.qk_dim, spec.num_heads, spec.n_win, spec.topk)} == {int}
    assert type(spec.scale) is float


def test_no_down_sampling_may_come_as_the_identity_that_is_built_for_it():
    assert torch.equal(_attend(kv_downsampling=downsampling.build("identity", 16, 16)), _attend())


def test_a_known_call_makes_no_specification(monkeypatch):
    _attend(), _route()
    made = []
    monkeypatch.setattr(functional.AttentionSpec, "__post_init__", made.append)
    _attend(), _route()
    assert not made
