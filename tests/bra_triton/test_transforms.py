"""Transforms of `torch.func` and forward mode: the right result or a clear error, never a silent zero."""

import pytest
import torch
from operator_calls import BRANCHES, OPERATORS, map_of, module_of
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

from bra_triton import functional

REFUSED = "no forward-mode differentiation; use backend='reference'"
# The interpreter is slow, and the rules of transforms are the same for both backends.
MOST = [*((branch, "torch") for branch in BRANCHES), ("padded", "triton"), ("everything", "triton")]
every_branch = pytest.mark.parametrize(("branch", "backend"), MOST)


def _route(qkv):
    return functional.region_routing(qkv, n_win=2, topk=2, diff_routing=True, backend="torch")[0]


def _regional(maps):
    graph = torch.tensor([[[[0, 1], [1, 2], [2, 3], [3, 0]]]])
    maps, graph = (*maps.chunk(3, 1),), graph.expand(len(maps), -1, -1, -1)
    return functional.regional_routing_attention(*maps, 0.3, graph, (2, 2), backend="torch")[0]


FUNCTIONS = {
    "route": (_route, torch.randn(3, 4, 4, 12)),
    "regional": (_regional, torch.randn(3, 12, 4, 4)),
}
MODULES = ("plain", "whole, padded", "everything", "NCHW, padded")


def _function(name):
    """A function of a tensor, and a tensor for it; the parameters of a module need no gradient."""
    if name in MODULES:
        module = module_of(name, "torch").requires_grad_(False).eval()
        return module, map_of(name, batch=3)
    return FUNCTIONS[name]


@pytest.fixture(params=[*FUNCTIONS, *MODULES])
def function(request):
    return _function(request.param)


def _dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODES = {
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jvp of what needs a gradient": lambda f, x: jvp(f, (x.clone().requires_grad_(),), (x,)),
    "dual numbers": _dual,
    "dual numbers that need a gradient": lambda f, x: _dual(f, x.clone().requires_grad_()),
    "dual numbers without gradients": torch.no_grad()(_dual),
    "jacfwd": lambda f, x: jacfwd(lambda x: f(x).sum())(x),
    "linearize": linearize,
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "jvp of grad": lambda f, x: jvp(grad(lambda x: f(x).sum()), (x,), (x,)),
    "grad of jvp": lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1].sum())(x),
    "jvp of vmap": lambda f, x: jvp(vmap(lambda x: f(x[None])[0]), (x,), (x,)),
    "vmap of jvp": lambda f, x: vmap(lambda x: jvp(f, (x[None],), (x[None],))[1])(x),
    "compiled jvp": lambda f, x: torch.compile(lambda x: jvp(f, (x,), (x,))[1], backend="aot_eager")(x),
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_forward_mode_is_refused(mode, function):
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=REFUSED):
        FORWARD_MODES[mode](*function)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_refuses_tangents(name):
    """Every operator refuses a tangent before it looks at the other arguments, also if called directly."""
    operator = getattr(torch.ops.bra_triton, name.removeprefix("bra_triton::")).default
    arguments = []
    for argument in operator._schema.arguments:
        values = {"Tensor": torch.ones(2), "int": 1, "float": 1.0, "str": "torch", "bool": True}
        kind = str(argument.type)
        arguments.append(values.get(kind, None if "Optional" in kind else []))
    with forward_ad.dual_level():
        arguments[0] = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(RuntimeError, match=REFUSED):
            operator(*arguments)


def test_the_reference_has_forward_mode():
    module, x = module_of("plain", "reference"), map_of("plain")
    step = 1e-3
    _, tangent = jvp(module, (x,), (x,))
    difference = (module(x * (1 + step)) - module(x * (1 - step))) / (2 * step)
    assert torch.allclose(tangent, difference, atol=1e-2)  # float32 loses three digits to the difference


def test_a_level_of_forward_mode_harms_no_other_tensors(function):
    f, x = function
    with forward_ad.dual_level():
        assert torch.equal(f(x), f(x))


def test_vmap_is_a_loop(function):
    f, x = function
    expected = torch.stack([f(each[None])[0] for each in x])
    # Not the same bits: on the CPU the rounding of matrix products depends on the operands' memory layout.
    for actual in (
        vmap(lambda each: f(each[None])[0])(x),
        vmap(lambda each: f(each[None])[0], in_dims=-1)(x.movedim(0, -1)),
    ):
        assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["regional", *MODULES])
def test_batches_of_gradients_are_refused(name):
    f, x = _function(name)
    x = x.clone().requires_grad_()
    out = f(x)
    with pytest.raises(RuntimeError, match=r"take no batch of gradients .* use torch\.func\.vmap"):
        torch.autograd.grad(out, x, torch.randn(2, *out.shape), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="take no batch of gradients"):
        torch.autograd.functional.jacobian(lambda x: f(x).sum(), x, vectorize=True)


def test_batches_of_gradients_are_refused_by_the_kernels_too():
    module, x = module_of("plain", "triton"), map_of("plain").requires_grad_()
    out = module(x)
    with pytest.raises(RuntimeError, match="take no batch of gradients"):
        torch.autograd.grad(out, x, torch.randn(2, *out.shape), is_grads_batched=True)


def test_the_reference_takes_batches_of_gradients():
    module, x = module_of("plain", "reference"), map_of("plain").requires_grad_()
    out = module(x)
    grads = torch.randn(2, *out.shape)
    expected = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads]
    actual = torch.autograd.grad(out, x, grads, is_grads_batched=True)[0]
    assert torch.allclose(actual, torch.stack(expected), atol=1e-6)


def test_jacobians_by_reverse_mode(function):
    f, x = function
    f, x = (f.double() if isinstance(f, torch.nn.Module) else f), x[:1].double()
    actual = jacrev(f)(x)
    expected = torch.autograd.functional.jacobian(f, x)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_a_second_derivative_is_refused(function):
    f, x = function
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad(lambda x: grad(lambda x: f(x).square().sum())(x).square().sum())(x)


@every_branch
def test_gradients_of_every_sample(branch, backend, device):
    """The gradients of every parameter for every sample equal those of a loop over the samples."""
    module, x = module_of(branch, backend).to(device).eval(), map_of(branch, batch=2).to(device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x[None],)).square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    loops = [grad(loss)(parameters, each) for each in x]
    for name, gradient in actual.items():
        expected = torch.stack([each[name] for each in loops])
        assert torch.allclose(gradient, expected, atol=1e-5, rtol=1e-4), name


def test_vmap_over_an_ensemble():
    """One map, and the stacked parameters of several modules."""
    modules, x = [module_of("padded", "torch") for _ in range(3)], map_of("padded")
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in modules])
        for name, _ in modules[0].named_parameters()
    }
    actual = vmap(lambda parameters: functional_call(modules[0], parameters, (x,)))(stacked)
    assert torch.allclose(actual, torch.stack([m(x) for m in modules]), atol=1e-6)


def test_a_batch_of_no_sample_is_refused():
    with pytest.raises(
        RuntimeError, match=r"need at least one sample under torch.func.vmap, got an empty batch"
    ):
        vmap(lambda x: _route(x[None])[0])(torch.randn(0, 4, 4, 12))
