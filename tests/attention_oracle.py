"""The oracle of routed attention, written token by token, and how a backend computes the same problem.

The oracle uses no tiles, no token lists and no kernels; `gradients` runs it in float64.
"""

import itertools
from dataclasses import replace

import planned
import torch

from bra_triton.backend.torch import attention as torch_attention
from bra_triton.kernels.attention.arguments import ForwardResults, Saved
from bra_triton.kernels.attention.launch import (
    Attention,
    launch_attention,
    launch_finish,
    launch_key_value_gradient,
    launch_query_gradient,
)
from bra_triton.kernels.forms import form_of
from bra_triton.kernels.problem import Gradients, Padding
from bra_triton.kernels.routing.lists import launch_key_lists, launch_query_lists, take_key_lists


def attend(problem):
    """Output `(N, H, W, dim)` of any problem, differentiable; computed region by region for each head."""
    padding = problem.padding or Padding(problem.key.new_zeros(()), problem.value.new_zeros(()))
    # The row of padding comes last, so that the token number -1, which means padding, indexes it.
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
        chosen = 0 if problem.r_idx is None else int(problem.r_idx[image, graph, region, slot])
        token = problem.kv_grid.token(chosen, index)
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
    """`out` and the gradients by name, float64: query, key, value and, if they exist, padding and factor."""
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
        r_idx=None if problem.r_idx is None else problem.r_idx.cpu(),
        padding=padding,
        factor=leaves.get("factor", factor),
    )
    out = attend(truth)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.double().cpu())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def run_backend(backend, problem, grad_out, needs_factor=False, targets=None):
    """The same tensors as `gradients` returns, computed by a backend's kernels, on the CPU.

    The backend writes the gradients of query, key and value to `targets`. By default these hold NaN, so that
    a test sees every element that the backend did not write.
    """
    if targets is None:
        maps = problem.query, problem.key, problem.value
        targets = Gradients(
            *(torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device) for x in maps)
        )
    of_backend = {"torch": _run_torch, "triton": _run_triton}[backend]
    out, padding, factor = of_backend(problem, grad_out, needs_factor, targets)
    results = {"out": out, "query": targets.query, "key": targets.key, "value": targets.value}
    if problem.padding is not None:
        results |= {"padding.key": padding.key, "padding.value": padding.value}
    if needs_factor:
        results["factor"] = factor
    return {name: x.cpu() for name, x in results.items()}


def _run_torch(problem, grad_out, needs_factor, targets):
    out, lse = torch_attention.attend_routed(problem)
    small = torch_attention.attention_backward(grad_out, problem, out, lse, targets, needs_factor)
    return out, small.padding, small.factor


def _run_triton(problem, grad_out, needs_factor, targets):
    out, factor_shares, padding_shares = planned.run(add_attention, problem, grad_out, needs_factor, targets)
    padding = factor = None
    if padding_shares is not None:
        widths = problem.qk_head_dim, problem.v_head_dim
        shares = padding_shares.sum((0, 2, 3)).split(widths, dim=-1)
        padding = Padding(*(share.flatten() for share in shares))
    if factor_shares is not None:
        # Sum over all tiles, and over all heads that follow the same graph.
        factor = factor_shares.sum(3).unflatten(1, (problem.n_graphs, -1)).sum(2)
    return out, padding, factor


def add_attention(plan, problem, grad_out, needs_factor, targets):
    """Adds an attention's forward and backward to a plan.

    Returns the output, and the programs' shares of the factor's and of the padding's gradient (or None).
    """
    form = form_of(problem, needs_factor)
    lists = take_key_lists(problem, form, plan.scratch)
    launch_key_lists(plan, problem, lists)
    attention = Attention(problem, form, lists)
    out = plan.output(grad_out.shape, problem.query.dtype)
    lse = plan.output((problem.batch, problem.num_heads, *problem.query.shape[1:3]), torch.float32)
    launch_attention(plan, attention, None, ForwardResults(out, None, lse))
    saved = Saved(out, lse, grad_out)
    statistics, factor_shares = launch_query_gradient(plan, attention, saved, targets.query, needs_factor)
    queries = launch_query_lists(plan, problem, lists)
    of_keys_values = launch_key_value_gradient(
        plan, attention, queries, statistics, grad_out, targets, problem.padding is not None
    )
    launch_finish(plan, of_keys_values)
    return out, factor_shares, of_keys_values.results.grad_padding
