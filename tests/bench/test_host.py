"""`bra-bench host`: how targets are judged; every form and plain attention compute what their names say."""

import pytest
import torch

from bra_triton.bench import host, measure, stand_in

CPU = torch.device("cpu")


def row(form, phase, fused, plain=1.0, compiled=False):
    seconds = {host.OURS: fused, host.PLAIN: plain}
    return {"form": form, "phase": phase, "compiled": compiled, "seconds": seconds}


def test_targets_are_ratios_to_plain_attention_or_to_the_identity_form():
    rows = [row("identity", "no grad", 2.0, 2.0), row("padded", "no grad", 2.6), row("soft", "no grad", 2.7)]
    assert host.missed(rows) == ["soft, no grad: 1.35 times identity fused, must be at most 1.3"]
    rows = [row("identity", "step", 1.16), row("identity", "step", 1.16, compiled=True)]
    assert host.missed(rows) == [
        "identity, step: 1.16 times identity plain, must be at most 1.15",
        "compiled identity, step: 1.16 times identity plain, must be at most 1.0",
    ]


@pytest.mark.parametrize("form", host.FORMS)
def test_every_form_is_what_it_is_called(form):
    """Compares with the reference on the torch backend; `test_bench_command` runs the Triton backend."""
    modules = host.modules_of(form, CPU)
    assert modules[host.OURS].backend == "triton"
    modules[host.OURS].backend = "torch"
    problem = host.FORMS[form]
    x = torch.randn(problem.batch, problem.height, problem.width, problem.dim)
    modules[host.EINOPS].load_state_dict(modules[host.OURS].state_dict())
    given = x.permute(0, 3, 1, 2) if form == host.NCHW else x
    torch.testing.assert_close(modules[host.OURS](given), modules[host.EINOPS](given), rtol=1e-4, atol=1e-5)
    assert modules[host.PLAIN](x).shape == x.shape


@pytest.mark.parametrize(
    "given", [["--form", "soft"], ["--phase", "grad"], ["--compiled", "--phase", "no grad"]], ids=" ".join
)
def test_a_check_that_would_compare_nothing_is_refused(given, capsys):
    """Other forms have targets relative to `identity`, and not every phase has a target."""
    with pytest.raises(SystemExit):
        host.main(["--check", *given])
    assert "--check needs --form identity and a --phase that has a target" in capsys.readouterr().err


def test_plain_attention_is_multi_head_attention():
    plain, x = host.PlainAttention(16, 2), torch.randn(2, 3, 4, 16)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    state = {"in_proj_weight": plain.qkv.weight, "in_proj_bias": plain.qkv.bias}
    theirs.load_state_dict(state | {"out_proj.weight": plain.wo.weight, "out_proj.bias": plain.wo.bias})
    tokens = x.flatten(1, 2)
    expected = theirs(tokens, tokens, tokens)[0].view_as(x)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


def test_calls_want_gradients_as_their_phase_says():
    x, module = torch.randn(1, 2, 2, 4), torch.nn.Linear(4, 4)
    assert not measure.call_of(module, x, "no grad")().requires_grad
    assert measure.call_of(module, x, "grad")().requires_grad
    measure.call_of(module, x, "step")()
    assert module.weight.grad is not None


def test_runs_take_turns_and_the_fastest_counts():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.interleaved_minima(runs, CPU, 3)
    assert order[:4] == ["a", "a", "b", "b"]
    assert all(sorted(order[i : i + 2]) == ["a", "b"] for i in (4, 6, 8))
    assert len(order) == 10
    assert set(times) == {"a", "b"}
    assert all(0 < seconds < 0.1 for seconds in times.values())


def test_the_stand_in_refuses_the_interpreter(monkeypatch):
    monkeypatch.setattr(stand_in.triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), stand_in.without_gpu():
        pass
