"""Every peer computes what it is timed as; the benchmark refuses one that does not."""

import json

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bra_triton import functional, reference
from bra_triton.backend.region_layout import pad_map
from bra_triton.bench import peer_times, peers
from bra_triton.bench.problems import Problem
from bra_triton.kernels.grid import RegionGrid
from bra_triton.spec import AttentionSpec

SPEC = AttentionSpec(32, 32, 2, n_win=3, topk=2)
PEERS = list(peers.peers_for(SPEC, "torch"))


@pytest.fixture(params=[9, 8], ids=["whole", "padded"])
def inputs(request):
    """A projection, its routing and what its padding holds, in float64."""
    qkv = torch.randn(2, request.param, request.param, SPEC.packed_dim, dtype=torch.float64)
    padding = torch.randn(SPEC.packed_dim, dtype=torch.float64) if request.param == 8 else None
    options = {"n_win": SPEC.n_win, "topk": SPEC.topk, "padding": padding, "backend": "torch"}
    return qkv, functional.region_routing(qkv, **options)[1], padding


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name in PEERS if name != "dense"])
def test_routed_peers_equal_the_reference(name, inputs):
    qkv, r_idx, padding = inputs
    expected = reference.attend(qkv, SPEC, padding=padding)
    peer = peers.peers_for(SPEC, "torch", padding, compile_flex=False)[name]
    assert torch.allclose(peer.prepare(qkv, r_idx)(qkv, r_idx), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["fused", "reference", "fused, regions given", "reference, regions given"])
def test_gradients_equal_the_references(name, inputs):
    """But for FlexAttention's, which has none on the CPU."""
    qkv, r_idx, padding = inputs
    qkv.requires_grad_()
    (expected,) = torch.autograd.grad(reference.attend(qkv, SPEC, padding=padding).square().sum(), qkv)
    peer = peers.peers_for(SPEC, "torch", padding)[name]
    (actual,) = torch.autograd.grad(peer.prepare(qkv, r_idx)(qkv, r_idx).square().sum(), qkv)
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_dense_peer_is_attention_to_all_regions_and_sees_no_padding():
    qkv = torch.randn(2, 9, 9, SPEC.packed_dim, dtype=torch.float64)
    every = AttentionSpec(32, 32, 2, n_win=3, topk=9)
    actual = peers.peers_for(SPEC, "torch")["dense"].prepare(qkv, None)(qkv, None)
    assert torch.allclose(actual, reference.attend(qkv, every), rtol=1e-10, atol=1e-10)
    assert torch.allclose(peers.dense_by_definition(SPEC)(qkv, None), actual, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("n_win", "tokens", "topk"),
    [(4, 16, 2), (2, 100, 2), (2, 128, 3), (7, 1, 49), (3, 9, 2)],
    ids=["several regions a block", "regions across blocks", "a block a region", "all", "padded P5"],
)
def test_block_mask_is_that_of_create_block_mask(n_win, tokens, topk):
    n_regions = n_win**2
    r_idx = torch.rand(2, n_regions, n_regions).argsort(-1)[..., :topk].contiguous()
    actual = peers.block_mask(r_idx, tokens)
    mask_mod = peers.mask_of_regions(peers.chosen_pairs(r_idx), tokens)
    length = n_regions * tokens
    expected = create_block_mask(mask_mod, 2, None, length, length, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.seq_lengths == expected.seq_lengths


def test_peers_refuse_what_they_cannot_compare():
    with pytest.raises(ValueError, match="spec must have qk_dim == dim and no routing weight"):
        peers.peers_for(AttentionSpec(32, 16, 2, 3, 2), "torch")


class TestBenchmark:
    def options(self, *more):
        return ["--device", "cpu", "--batch", "1", "--repeats", "1", "--no-compile", *more]

    def test_figures_of_a_row(self, tmp_path, capsys):
        names = ["fused, regions given", "reference, regions given"]
        flags = self.options("--problem", "tiny_padded", "--out", str(tmp_path), "--peers", *names)
        assert peer_times.main(flags) == 0
        row = json.loads((tmp_path / "tiny_padded-batch1-float32.json").read_text())
        assert list(row["peers"]) == names
        for peer in row["peers"].values():
            for which in peer_times.PASSES:
                assert peer[which]["work_seconds"] > 0
                assert peer[which]["peak_bytes"] > 0
        assert row["versions"]["torch"] == torch.__version__
        assert f"torch {torch.__version__}" in capsys.readouterr().out

    @pytest.mark.parametrize("wrong", ["another scale", "one gradient", "nan"])
    def test_peer_that_computes_something_else_is_refused(self, wrong, monkeypatch, capsys):
        right = peers.reference_attention

        def attend(qkv, r_idx, spec):
            if wrong == "another scale":
                return right(qkv * 1.05, r_idx, spec)
            if wrong == "nan":
                return right(qkv, r_idx, spec) * float("nan")
            return right(torch.cat((qkv[..., :32].detach(), qkv[..., 32:]), -1), r_idx, spec)

        truth = peer_times.truth_of
        monkeypatch.setattr(peers, "reference_attention", attend)

        def true_truth(*args):
            with monkeypatch.context() as context:
                context.setattr(peers, "reference_attention", right)
                return truth(*args)

        monkeypatch.setattr(peer_times, "truth_of", true_truth)
        flags = self.options("--check-only", "--peers", "fused", "reference, regions given")
        assert peer_times.main(flags) == 1
        out = capsys.readouterr().out
        assert "FAILED: tiny, reference, regions given" in out
        assert "tiny, fused" not in out

    def test_peer_that_cannot_run_is_reported_and_the_rest_goes_on(self, monkeypatch, capsys):
        def broken(qkv, r_idx, spec):
            raise RuntimeError("no kernel\nfor this")

        monkeypatch.setattr(peers, "dense_attention", broken)
        assert peer_times.main(self.options("--check-only", "--peers", "dense", "fused")) == 0
        out = capsys.readouterr().out
        assert "- dense, forward: RuntimeError: no kernel for this" in out
        assert "checked" in out

    def test_kernels_that_cannot_run_are_a_failure(self, monkeypatch, capsys):
        def broken(*args, **options):
            raise RuntimeError("no kernel")

        monkeypatch.setattr(peers, "fused_attention", broken)
        assert peer_times.main(self.options("--check-only", "--peers", "fused", "dense")) == 1
        assert "FAILED: tiny, fused, forward: RuntimeError: no kernel" in capsys.readouterr().out

    def test_data_that_routes_differently_for_every_input_set(self):
        """Timing one routing again and again would keep its regions in the cache."""
        problem = Problem("", 1, 8, 8, 32, 1, 4, 3)
        drawn = (problem, torch.float32, torch.device("cpu"), None)
        sets = [peer_times.make_inputs(*drawn) for _ in range(2)]
        assert not torch.equal(sets[0].r_idx, sets[1].r_idx)


def test_padding_reaches_the_routing_of_the_fused_peer():
    qkv, padding = torch.randn(1, 8, 8, SPEC.packed_dim), torch.randn(SPEC.packed_dim) * 3
    padded = pad_map(qkv, RegionGrid.of_windows(8, 8, SPEC.n_win), padding)
    expected = reference.route(padded, SPEC)[1]
    assert torch.equal(peers.fused_routing(qkv, padding, SPEC, "torch").long(), expected)
