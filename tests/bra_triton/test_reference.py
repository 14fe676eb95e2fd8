"""The reference against an independent formulation: dense attention under a routing mask."""

import pytest
import torch
import torch.nn.functional as F
from problems import CASES, random_map, relative_error

from bra_triton import BiLevelRoutingAttention, reference
from bra_triton.call import Call
from bra_triton.kernels.grid import RegionGrid
from bra_triton.spec import AttentionSpec


def _regions_of_tokens(grid: RegionGrid) -> torch.Tensor:
    """Region of every token of the map, computed without the methods of `RegionGrid`."""
    rows = torch.arange(grid.height) // grid.region_height
    columns = torch.arange(grid.width) // grid.region_width
    return (rows[:, None] * grid.columns + columns).flatten()


def _masked_dense_attention(qkv, r_idx, spec):
    batch, height, width, _ = qkv.shape
    region = _regions_of_tokens(RegionGrid.of_windows(height, width, spec.n_win))
    chosen = torch.zeros(batch, spec.n_win**2, spec.n_win**2, dtype=torch.bool)
    for image, row, slots in ((n, r, r_idx[n, r]) for n in range(batch) for r in range(spec.n_win**2)):
        chosen[image, row, slots] = True
    mask = chosen[:, region][:, :, region]
    query, key, value = (
        x.reshape(batch, height * width, spec.num_heads, -1).transpose(1, 2)
        for x in qkv.split([spec.qk_dim, spec.qk_dim, spec.dim], dim=-1)
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=spec.scale)
    return out.transpose(1, 2).reshape(batch, height, width, spec.dim)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_dense_attention_under_the_routing_mask(case):
    qkv = random_map(case, torch.device("cpu"))
    out, _, r_idx, attn_weight = reference.attend(Call(qkv, case.spec))
    assert relative_error(out, _masked_dense_attention(qkv, r_idx, case.spec)) < 1e-12
    assert torch.allclose(attn_weight.sum(-1), torch.ones((), dtype=torch.float64))


def test_routes_to_the_regions_with_the_most_similar_means():
    """Four regions with known means, so that the right choice is known."""
    spec = AttentionSpec(4, 4, 1, n_win=2, topk=2)
    qkv = torch.zeros(1, 4, 4, 12, dtype=torch.float64)
    qkv[..., 0] = 1.0  # every query is the unit vector of channel 0
    for region, strength in enumerate((0.0, 3.0, -1.0, 2.0)):
        qkv[:, region // 2 * 2 : region // 2 * 2 + 2, region % 2 * 2 : region % 2 * 2 + 2, 4] = strength
    r_weight, r_idx = reference.route(Call(qkv, spec))
    assert r_idx.tolist() == [[[1, 3]] * 4]
    expected = torch.softmax(torch.tensor([3.0, 2.0], dtype=torch.float64) * spec.scale, 0)
    assert torch.allclose(r_weight[0, 0], expected)


def test_equal_logits_go_to_the_smaller_region():
    spec = AttentionSpec(4, 4, 1, n_win=4, topk=3)
    _, r_idx = reference.route(Call(torch.ones(1, 8, 8, 12), spec))
    assert (r_idx == torch.arange(3)).all()


def _rounded_means(qkv, channels):
    """Region means of 2 x 2 tokens, rounded to the dtype of `qkv`."""
    return F.avg_pool2d(qkv[..., :channels].permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("counts_padding", [True, False], ids=["NHWC", "NCHW"])
def test_half_precision_routes_by_float32_means(counts_padding, device):
    """Rounded to bfloat16, the means of these tokens would choose other regions."""
    spec = AttentionSpec(32, 32, 1, n_win=8, topk=8, counts_padding=counts_padding)
    qkv = torch.randn(1, 16, 16, 96, device=device).bfloat16()
    r_weight, r_idx = reference.route(Call(qkv.float(), spec))
    query, key = _rounded_means(qkv, 64).chunk(2, dim=-1)
    assert not torch.equal((query @ key.transpose(1, 2)).topk(8).indices, r_idx)
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            actual = reference.attend(Call(qkv, spec))
        assert actual.r_weight.dtype == torch.float32
        assert torch.equal(actual.r_idx, r_idx)
        assert torch.equal(actual.r_weight, r_weight)


class TestModes:
    """The original's other modes, on the reference, which defines their semantics."""

    @staticmethod
    def _module(**arguments):
        torch.manual_seed(0)
        arguments = {"topk": 2, **arguments}
        module = BiLevelRoutingAttention(8, 2, n_win=2, qk_scale=1.0, **arguments, backend="reference")
        return module.double()

    x = torch.randn(1, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def test_hard_routing_has_the_forward_of_none_and_a_gradient_for_the_router(self):
        plain, hard = self._module(), self._module(diff_routing=True, param_routing=True)
        hard.load_state_dict(plain.state_dict(), strict=False)
        with torch.no_grad():
            hard.router.emb.weight.copy_(torch.eye(8))
            hard.router.emb.bias.zero_()
        assert torch.equal(plain(self.x), hard(self.x))
        hard(self.x).square().sum().backward()
        assert hard.router.emb.weight.grad.norm() > 0

    def test_soft_routing_weighs_the_chosen_keys_and_values(self):
        """With one chosen region its weight is 1, so soft routing changes nothing; with two it does."""
        errors = []
        for topk in (1, 2):
            plain, soft = (self._module(topk=topk, soft_routing=soft) for soft in (False, True))
            errors.append(relative_error(soft(self.x), plain(self.x)))
        assert errors[0] < 1e-12
        assert errors[1] > 1e-3

    @pytest.mark.parametrize(
        ("mode", "keys"), [("ada_avgpool", 4), ("ada_maxpool", 4), ("avgpool", 4), ("maxpool", 4)]
    )
    def test_downsampling_reduces_the_keys_of_each_region(self, mode, keys):
        module = self._module(kv_downsample_mode=mode, kv_per_win=2, kv_downsample_ratio=2)
        _, _, _, attn_weight = module(self.x, ret_attn_mask=True)
        assert attn_weight.shape == (4, 2, 16, 2 * keys)


def test_a_map_without_data_is_taken():
    """As summaries and initialisation on the device "meta" do it; autocast does not know this device."""
    module = BiLevelRoutingAttention(12, 2, n_win=2, topk=2, backend="reference").to("meta")
    assert module(torch.empty(1, 4, 6, 12, device="meta")).shape == (1, 4, 6, 12)
