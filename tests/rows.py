"""Builds models from yaml rows, and reads the errors of refused rows."""

import copy

import pytest
from torch import nn
from ultralytics.nn import tasks


def build(*rows: list, **settings: object) -> nn.Sequential:
    """Parses rows behind one 64-channel convolution; the head is one more convolution of 32 channels."""
    yaml = {
        "nc": 1,
        "backbone": [[-1, 1, "Conv", [64, 3, 2]], *(list(row) for row in rows)],
        "head": [[-1, 1, "Conv", [32, 1]]],
        **settings,
    }
    return tasks.parse_model(yaml, ch=3, verbose=False)[0]


def refusal(*rows: list) -> str:
    """The error of refused rows, without its beginning, which is the last row as the user wrote it."""
    written = copy.deepcopy(list(rows[-1]))
    with pytest.raises(ValueError, match=r"^row \d+, \[") as error:
        build(*rows)
    begin = f"row {len(rows)}, {written}: "
    assert str(error.value).startswith(begin)
    return str(error.value).removeprefix(begin)
