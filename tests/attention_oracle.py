"""Attention over routed regions, written token by token in float64: no tiles, lists or regions in memory."""

import itertools
from dataclasses import replace

import torch

from bra_triton.kernels.problem import Gradients, Padding


def attend(problem):
    """Output `(N, H, W, dim)` of any problem, differentiable; one query region of one head at a time."""
    padding = problem.padding or Padding(problem.key.new_zeros(()), problem.value.new_zeros(()))
    # Token -1 is padding: the last row.
    key, value = (
        torch.cat([x.flatten(1, 2), pad.expand(x.shape[0], 1, x.shape[-1])], 1)
        for x, pad in ((problem.key, padding.key), (problem.value, padding.value))
    )
    query = problem.query.flatten(1, 2)
    out = query.new_zeros(*query.shape[:2], value.shape[-1])
    images = []
    for image in range(problem.batch):
        heads = []
        for head in range(problem.num_heads):
            part = out[image, :, : problem.v_head_dim]
            for region in range(problem.query_grid.n_regions):
                part = _attend_region(
                    problem, query[image], key[image], value[image], image, head, region, part
                )
            heads.append(part)
        images.append(torch.cat(heads, -1))
    return torch.stack(images).view(*problem.query.shape[:3], -1)


def _attend_region(problem, query, key, value, image, head, region, out):
    own = [problem.query_grid.token(region, i) for i in range(problem.query_grid.region_tokens)]
    own = [token for token in own if token is not None]
    if not own:
        return out
    graph = head if problem.n_graphs > 1 else 0
    keys, factors = [], []
    for slot, index in itertools.product(range(problem.topk), range(problem.kv_grid.region_tokens)):
        token = problem.kv_grid.token(int(problem.r_idx[image, graph, region, slot]), index)
        keys.append(-1 if token is None else token)
        if problem.factor is not None:
            factors.append(problem.factor[image, graph, region, slot])
    of_qk = slice(head * problem.qk_head_dim, (head + 1) * problem.qk_head_dim)
    of_v = slice(head * problem.v_head_dim, (head + 1) * problem.v_head_dim)
    factor = torch.stack(factors)[:, None] if factors else 1.0
    scores = query[own][:, of_qk] @ (key[keys][:, of_qk] * factor).T * problem.scale
    rows = scores.softmax(-1) @ (value[keys][:, of_v] * factor)
    return out.index_put((torch.tensor(own),), rows)


def gradients(problem, grad_out, needs_factor=False):
    """`out`, and gradients by name: query, key, value, and those of padding and factor that exist."""
    leaves = {name: getattr(problem, name) for name in ("query", "key", "value")}
    if problem.padding is not None:
        leaves |= {"padding.key": problem.padding.key, "padding.value": problem.padding.value}
    if needs_factor:
        factor = problem.factor
        leaves["factor"] = torch.ones(problem.r_idx.shape) if factor is None else factor
    leaves = {name: x.detach().double().cpu().requires_grad_() for name, x in leaves.items()}
    padding = None
    if problem.padding is not None:
        padding = Padding(leaves["padding.key"], leaves["padding.value"])
    factor = None if problem.factor is None else problem.factor.double().cpu()
    truth = replace(
        problem,
        **{name: leaves[name] for name in ("query", "key", "value")},
        r_idx=problem.r_idx.cpu(),
        padding=padding,
        factor=leaves.get("factor", factor),
    )
    out = attend(truth)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.double().cpu())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def run_backend(backend, problem, grad_out, needs_factor=False):
    """The same of a backend; maps are filled with NaN first, so what is not written shows."""
    targets = Gradients(
        *(torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device) for x in _maps(problem))
    )
    out, _, lse = backend.attention_forward(problem)
    small = backend.attention_backward(grad_out, problem, out, lse, targets, needs_factor)
    results = {"out": out, "query": targets.query, "key": targets.key, "value": targets.value}
    if problem.padding is not None:
        results |= {"padding.key": small.padding.key, "padding.value": small.padding.value}
    if needs_factor:
        results["factor"] = small.factor
    return {name: x.cpu() for name, x in results.items()}


def _maps(problem):
    return problem.query, problem.key, problem.value
