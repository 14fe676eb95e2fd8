"""`AttentionSpec`: the default scale."""

from bra_triton.spec import AttentionSpec


def test_scale_defaults_to_that_of_all_heads_together():
    assert AttentionSpec(64, 16, 4, 7, 4).scale == 0.25
    assert AttentionSpec(64, 16, 4, 7, 4, qk_scale=2.0).scale == 2.0
