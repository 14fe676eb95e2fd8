"""Mutants of `tests.mutate` that compute the same as the original: file, changed line, reason."""

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "bra_triton/backend/torch/chunks.py",
        "out, lse = (_joined(each) for each in zip(*parts, strict=False))",
    ): "every part is a pair",
    (
        "bra_triton/backend/torch/efficient.py",
        "query, value = (x.new_empty(2, 1, 1, head_dim) for head_dim in (qk_head_dim, v_head_dim))",
    ): "PyTorch is asked about heads, not about how many there are",
    (
        "kernels/routed.py",
        "if padding_key is not None or padding_value is not None:",
    ): "either both are given or neither",
    (
        "kernels/routing/lists.py",
        "lists, work, longest, _ = listing or (None, None, 2, None)",
    ): "without lists no row is cut",
    ("kernels/small_map/arguments.py", "BLOCK_C: int = 1"): "programs that do not route do not read it",
    (
        "kernels/attention/arguments.py",
        "GRAD_VALUE_STRIDE: int = 1",
    ): "dK/dV's launch sets it, nobody else reads it",
    ("kernels/bounded.py", "MOST_ENTRIES = 1025"): "any bound will do",
    (
        "kernels/routing/arguments.py",
        "MARK = 3.0**63",
    ): "the product overflows to minus infinity, which masks as well as a number that is as low",
    (
        "kernels/routing/graph.py",
        "at = place[:, None] * region_tokens + index",
    ): "places count images in 64 bits; where they are regions of a map, it has fewer than 2**31 tokens",
    (
        "kernels/routing/plans.py",
        "plan = Plan(tensors, tensors[1].device)",
    ): "all tensors of an operator are on one device",
    (
        "kernels/routing/arguments.py",
        "COUNTS_PADDING: bool = False",
    ): "the launch of the gradient sets it, nobody else reads it",
    (
        "kernels/routing/graph.py",
        "choice = tl.load(r_idx + row.to(tl.int64) * topk + slot, mask=row < n_rows, other=-2)",
    ): "rows that do not exist are not stored",
    (
        "kernels/lib/addressing.py",
        "token = tl.where(exists, index, -2)",
    ): "only the sign of a token that does not exist is used",
    (
        "bra_triton/backend/torch/masked.py",
        "return fits and queries * keys <= _REGION + chosen * (_KEY + _PAIR + queries)",
    ): "a rule of thumb; for the sizes of the tests both versions decide alike",
}
