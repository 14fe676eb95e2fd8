"""Mutants of `tests.mutate` that compute the same: file, the changed line, and why no test can fail."""

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "kernels/routing/graph.py",
        "at = place[:, None] * region_tokens + index",
    ): "places count images in 64 bits; where they are regions of a map, it has fewer than 2**31 tokens",
}
