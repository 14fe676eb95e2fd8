"""Mutants of `tests.mutate` that compute the same: file, the changed line, and why no test can fail."""

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "bra_triton/backend/torch/chunks.py",
        "out, lse = (_joined(each) for each in zip(*parts, strict=False))",
    ): "every part is a pair",
    (
        "kernels/routing/graph.py",
        "at = place[:, None] * region_tokens + index",
    ): "places count images in 64 bits; where they are regions of a map, it has fewer than 2**31 tokens",
}
