"""Every peer computes the attention that it is timed for; the benchmark refuses a peer that does not."""

import json

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bra_triton import functional
from bra_triton.bench import measure, peer_times, peers
from bra_triton.bench.problems import PROBLEMS, Problem

# Regions of 3 x 3 tokens, on a map that they divide and on a map that needs padding.
WHOLE = Problem("", 2, 9, 9, 32, 2, 3, 2)
PADDED = Problem("", 2, 8, 8, 32, 2, 3, 2)


def attend(qkv, problem, topk, padding=None):
    """The reference's output, by the public function."""
    sizes = {"num_heads": problem.num_heads, "n_win": problem.n_win, "topk": topk}
    return functional.bi_level_routing_attention(qkv, **sizes, padding=padding, backend="reference")


@pytest.fixture(params=[WHOLE, PADDED], ids=["whole", "padded"])
def inputs(request):
    """A problem, its packed projection and the packed row of its padding (or None), in float64."""
    problem = request.param
    qkv = torch.randn(2, problem.height, problem.width, 3 * problem.dim, dtype=torch.float64)
    padding = torch.randn(3 * problem.dim, dtype=torch.float64) if problem.grid.is_padded else None
    return problem, qkv, padding


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["fused", "reference", "gather", "flex", "torch"])
def test_routed_peers_equal_the_reference(name, inputs, monkeypatch):
    monkeypatch.setattr(peers, "compiled_flex_attention", lambda: peers.flex_attention)
    problem, qkv, padding = inputs
    backend = "triton" if name == "torch" else "torch"  # "torch" is a peer of the Triton backend only
    peer = peers.peers_for(problem, backend, padding)[name]
    expected = attend(qkv, problem, problem.topk, padding)
    torch.testing.assert_close(peer.attend(qkv), expected, rtol=1e-10, atol=1e-10)


def test_dense_peer_is_attention_to_all_regions_and_sees_no_padding(inputs):
    problem, qkv, _ = inputs
    one_region = Problem("", 2, problem.height, problem.width, 32, 2, 1, 1)
    expected = attend(qkv, one_region, 1)
    definition = peer_times.definition(problem, None, is_dense=True)
    for peer in (peers.peers_for(problem, "torch")["dense"], definition):
        torch.testing.assert_close(peer.attend(qkv), expected, rtol=1e-10, atol=1e-10)


def test_the_definition_of_the_largest_maps_keeps_no_scores():
    assert "einops" in peer_times.definition(WHOLE, None, is_dense=False).includes
    assert "einops" in peer_times.definition(PROBLEMS["high_resolution"], None, is_dense=False).includes
    # The reference would hold 238 GB of scores.
    assert "torch" in peer_times.definition(PROBLEMS["issue_21"], None, is_dense=False).includes


def test_the_torch_backend_is_a_peer_of_the_triton_backend_alone(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuple(peers.peers_for(WHOLE, "triton")) == peers.NAMES
    assert tuple(peers.peers_for(WHOLE, "torch")) == tuple(n for n in peers.NAMES if n != "torch")
    with pytest.raises(SystemExit):
        peer_times.main(["--peers", "fused", "torch"])
    assert "--peers torch needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n_win", "tokens", "topk"),
    [(4, 16, 2), (2, 100, 2), (2, 128, 3), (7, 1, 49), (3, 9, 2)],
    ids=["several regions a block", "regions across blocks", "a block a region", "all", "padded P5"],
)
def test_block_mask_is_that_of_create_block_mask(n_win, tokens, topk):
    n_regions = n_win**2
    r_idx = torch.rand(2, n_regions, n_regions).argsort(-1)[..., :topk].contiguous()
    actual = peers.block_mask(r_idx, tokens)
    length = n_regions * tokens
    expected = create_block_mask(actual.mask_mod, 2, None, length, length, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.seq_lengths == expected.seq_lengths


class TestBenchmark:
    @pytest.fixture(autouse=True)
    def _on_the_cpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def options(self, *more):
        return ["--batch", "1", "--repeats", "1", *more]

    def test_figures_of_a_row(self, tmp_path, capsys):
        names, file = ["fused", "reference"], tmp_path / "rows.json"
        flags = self.options("--problem", "tiny_padded", "--json", str(file), "--peers", *names)
        assert peer_times.main(flags) == 0
        (row,) = json.loads(file.read_text())
        assert list(row["peers"]) == names
        for peer in row["peers"].values():
            for which in peer_times.PASSES:
                assert peer[which]["work ms"] > 0
                assert peer[which]["peak MiB"] > 0
        assert row["versions"]["torch"] == torch.__version__
        assert f"torch {torch.__version__}" in capsys.readouterr().out

    def test_only_the_fused_and_the_dense_peer_make_one_table(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(measure, "median_device_seconds", lambda run, device, repeats: next(seconds))
        seconds = iter([2e-6, 3e-6, 4e-6, 8e-6] * 4)  # both passes of the fused peer, then of the dense one
        file = tmp_path / "rows.json"
        flags = ["--problem", "tiny", "tiny_padded", "--peers", "dense", "fused", "--json", str(file)]
        assert peer_times.main([*self.options(*flags), "--batch", "1", "2"]) == 0
        head, _, *lines = [x.strip("|").split("|") for x in capsys.readouterr().out.splitlines() if "|" in x]
        of_pass = ["fused", "dense", "dense/fused"]
        columns = [f"{which}: {name}" for which in peer_times.PASSES for name in of_pass]
        assert [cell.strip() for cell in head] == ["problem", "batch", *columns]
        times = ["2.0", "4.0", "2.00", "3.0", "8.0", "2.67"]
        cells = [[cell.strip() for cell in line] for line in lines]
        problems = [(name, batch) for name in ("tiny", "tiny_padded") for batch in ("1", "2")]
        assert cells == [[*problem, *times] for problem in problems]
        rows = json.loads(file.read_text())
        assert [(row["problem"], str(row["batch"])) for row in rows] == problems

    def test_the_rate_is_that_of_scores_beside_dense_attention(self):
        """A map of 8 x 8 tokens in 3 x 3 regions of 9 tokens: a query has 64 keys if attention is dense, and
        2 regions of 9 keys if it is routed."""
        times = {"fused": 2.0, "dense": 4.0}
        figures = {name: {"work ms": t, "call ms": t, "peak MiB": 1} for name, t in times.items()}
        peers_of_row = {name: dict.fromkeys(peer_times.PASSES, one) for name, one in figures.items()}
        row = peer_times.measure_row(PADDED, "float32", [], 0)
        row["peers"] = peers_of_row
        rates = {name: peer_times._cells(name, "training", row)["training: rate"] for name in times}
        assert rates == {"fused": f"{18 / 64 * 4 / 2:.2f}", "dense": "1.00"}

    @pytest.mark.parametrize("wrong", ["another scale", "one gradient", "nan"])
    def test_peer_that_computes_something_else_is_refused(self, wrong, monkeypatch, capsys):
        right = peers.dense_attention

        def attend(qkv, num_heads):
            if wrong == "another scale":
                return right(qkv * 1.05, num_heads)
            if wrong == "nan":
                return right(qkv, num_heads) * float("nan")
            return right(torch.cat((qkv[..., :32].detach(), qkv[..., 32:]), -1), num_heads)

        monkeypatch.setattr(peers, "dense_attention", attend)
        assert peer_times.main(self.options("--check-only", "--peers", "fused", "dense")) == 1
        out = capsys.readouterr().out
        assert "FAILED: tiny, batch 1, dense" in out
        assert "batch 1, fused" not in out
        assert f"{3 if wrong == 'one gradient' else 2} of 4 passes give the right result" in out

    def test_peer_that_cannot_run_is_reported_and_the_rest_goes_on(self, monkeypatch, capsys):
        def broken(*args, **options):
            raise RuntimeError("no kernel\nfor this")

        monkeypatch.setattr(peers, "route_and_flex", broken)
        assert peer_times.main(self.options("--check-only", "--peers", "flex", "fused")) == 0
        out = capsys.readouterr().out
        assert "- tiny, batch 1, flex, forward: RuntimeError: no kernel for this" in out
        assert "2 of 4 passes give the right result" in out
        assert "checked" in out

    def test_kernels_that_cannot_run_are_a_failure(self, monkeypatch, capsys):
        def peers_for(problem, backend, padding):
            found = peers.peers_for(problem, "torch", padding)
            return found | {"fused": peers.peers_for(problem, "nonsense", padding)["fused"]}

        monkeypatch.setattr(peer_times, "peers_for", peers_for)
        monkeypatch.setattr(
            peer_times, "definition", lambda *arguments: peers.peers_for(WHOLE, "torch")["dense"]
        )
        assert peer_times.main(self.options("--check-only", "--peers", "fused", "dense")) == 1
        assert "FAILED: tiny, batch 1, fused, forward: ValueError: backend must be" in capsys.readouterr().out
