"""The reference of the NCHW form, compared with independent formulations."""

import pytest
import torch
from problems import relative_error
from regional_problems import REGIONAL_CASES
from torch import nn

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention, reference
from bra_triton.call import Call
from bra_triton.kernels.grid import RegionGrid
from bra_triton.regional_call import regional_call
from bra_triton.spec import AttentionSpec

# Rounding of float64 gives some 1e-16 at these sizes.
FLOAT64_TOLERANCE = 1e-12


def _attend_regional(*arguments, kv_region_size=None, region_size):
    """Output and attention matrix; takes the arguments of `functional.regional_routing_attention`."""
    return reference.attend_regional(regional_call(*arguments, region_size, kv_region_size, auto_pad=True))


def _tokens_of_regions(size, region_size):
    """For every region the (row, column) of its tokens, in order, including tokens past the map's edge."""
    counts = [-(-side // region_side) for side, region_side in zip(size, region_size, strict=True)]
    return [
        [
            (j * region_size[0] + h, i * region_size[1] + w)
            for h in range(region_size[0])
            for w in range(region_size[1])
        ]
        for j in range(counts[0])
        for i in range(counts[1])
    ]


def _dense_attention_token_by_token(case, query, key, value, graph):
    """Attention of every query to all key tokens, zeros past the edge, masked by the head's graph."""
    kv_size = case.kv_size or case.size
    query_regions = _tokens_of_regions(case.size, case.region_size)
    key_regions = _tokens_of_regions(kv_size, case.kv_region_size or case.region_size)
    key_tokens = [
        (region, row, column) for region, tokens in enumerate(key_regions) for row, column in tokens
    ]

    def column_of(x, head, row, column):
        width = x.shape[1] // case.num_heads
        inside = row < kv_size[0] and column < kv_size[1]
        token = x[:, :, row, column] if inside else torch.zeros_like(x[:, :, 0, 0])
        return token[:, head * width : (head + 1) * width]

    outputs = []
    for head in range(case.num_heads):
        head_keys, head_values = (
            torch.stack([column_of(x, head, row, column) for _, row, column in key_tokens], 1)
            for x in (key, value)
        )
        key_region = torch.tensor([region for region, _, _ in key_tokens])
        out = query.new_zeros(case.batch, head_values.shape[-1], *case.size)
        for region, tokens in enumerate(query_regions):
            for row, column in tokens:
                if row >= case.size[0] or column >= case.size[1]:
                    continue
                token = query[:, head * case.head_dim : (head + 1) * case.head_dim, row, column]
                logits = case.scale * (head_keys @ token[:, :, None]).squeeze(-1)
                chosen = (key_region[None, :, None] == graph[:, head, region][:, None]).any(-1)
                weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
                out[:, :, row, column] = (weights[:, None] @ head_values).squeeze(1)
        outputs.append(out)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("case", REGIONAL_CASES, ids=lambda case: case.name)
def test_equals_dense_attention_under_a_mask_per_head_built_token_by_token(case):
    query, key, value = case.maps()
    graph = case.graph()
    out, attn_weight = _attend_regional(query, key, value, case.scale, graph, **case.numbers)
    expected = _dense_attention_token_by_token(case, query, key, value, graph)
    assert out.shape == expected.shape
    assert relative_error(out, expected) < FLOAT64_TOLERANCE
    assert attn_weight.shape == (
        case.batch,
        case.num_heads,
        case.query_grid.n_regions,
        case.query_grid.region_tokens,
        case.topk * case.kv_grid.region_tokens,
    )
    assert torch.allclose(attn_weight.sum(-1), torch.ones((), dtype=torch.float64))


def test_a_region_named_twice_counts_twice():
    """Two regions of one token; the first region's keys are token 0 twice, with weights of 0.5 each."""
    query, key, value = (torch.randn(1, 4, 1, 2, dtype=torch.float64) for _ in range(3))
    graph = torch.tensor([[[[0, 0], [0, 1]]]])
    out, attn_weight = _attend_regional(query, key, value, 1.0, graph, region_size=(1, 1))
    assert torch.allclose(attn_weight[0, 0, 0, 0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert torch.allclose(out[..., 0], value[..., 0])


def test_padded_keys_take_part_with_logit_and_value_zero():
    """One token in a region of four: its value gets the weight exp(qk) / (exp(qk) + 3)."""
    query, key, value = (torch.full((1, 1, 1, 1), x, dtype=torch.float64) for x in (2.0, 3.0, 5.0))
    graph = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    out, _ = _attend_regional(query, key, value, 0.1, graph, region_size=(2, 2))
    weight = torch.tensor(0.6, dtype=torch.float64).exp()
    assert torch.allclose(out.squeeze(), 5 * weight / (weight + 3))


def test_gradcheck():
    """The queries' grid is padded, the keys' grid is another one; values are wider than keys; two heads."""
    sizes = {"query": (2, 3, 2), "key": (2, 2, 3), "value": (4, 2, 3)}
    maps = [torch.randn(1, *size, dtype=torch.float64, requires_grad=True) for size in sizes.values()]
    graph = torch.tensor([[[[0, 2], [1, 0]], [[1, 2], [2, 0]]]])

    def attend(*maps):
        return _attend_regional(*maps, 0.7, graph, region_size=(2, 2), kv_region_size=(2, 1))

    torch.autograd.gradcheck(attend, maps)


def _route(query, key, grid, topk):
    """The regions that the NCHW form chooses for maps `(N, C, H, W)`."""
    qkv = torch.cat((query, key, key), 1).permute(0, 2, 3, 1)
    dim = query.shape[1]
    spec = AttentionSpec(
        dim, dim, 1, max(grid.rows, grid.columns), topk, router_scale=1.0, counts_padding=False
    )
    return reference.route(Call(qkv, spec, given_grid=grid))[1]


class TestRouting:
    def test_means_leave_padding_out(self):
        """A map of 5 x 7, regions of 2 x 3: the last row and column of regions are partly past the edge."""
        grid = RegionGrid.of_region_size(5, 7, (2, 3))
        query, key = torch.randn(2, 2, 4, 5, 7, dtype=torch.float64)
        means = []
        for x in (query, key):
            tokens = [
                [x[:, :, row, column] for row, column in region if row < 5 and column < 7]
                for region in _tokens_of_regions((5, 7), (2, 3))
            ]
            means.append(torch.stack([torch.stack(region).mean(0) for region in tokens], 1))
        expected = (means[0] @ means[1].transpose(1, 2)).topk(3).indices
        assert torch.equal(_route(query, key, grid, 3), expected)

    def test_equal_logits_go_to_the_smaller_region(self):
        grid = RegionGrid.of_region_size(8, 8, (2, 2))
        ones = torch.ones(1, 4, 8, 8)
        assert (_route(ones, ones, grid, 3) == torch.arange(3)).all()


def _pair(dim=16, num_heads=2, n_win=3, **arguments):
    """The NCHW and the NHWC reference in float64 with the same weights."""
    arguments = {**arguments, "backend": "reference"}
    nchw = NCHWBiLevelRoutingAttention(dim, num_heads, n_win, **arguments).double()
    nhwc = BiLevelRoutingAttention(dim, num_heads, n_win, **arguments).double()
    names = {"qkv.qkv": "qkv_linear", "wo": "output_linear", "lepe": "lepe"}
    weights = nchw.state_dict()
    nhwc.load_state_dict(
        {
            key: weights[f"{names[name]}.{kind}"].reshape(value.shape)
            for key, value in nhwc.state_dict().items()
            for name, kind in [key.rsplit(".", 1)]
        }
    )
    return nchw, nhwc


@pytest.mark.parametrize(
    "arguments", [{}, {"qk_scale": 0.7, "side_dwconv": 5}, {"side_dwconv": 0, "topk": 9}]
)
def test_module_agrees_with_the_nhwc_form_where_n_win_divides_the_map(arguments):
    """The routing logits of both forms differ only by a positive factor, so both choose the same regions."""
    nchw, nhwc = _pair(**arguments)
    x = torch.randn(2, 16, 9, 12, dtype=torch.float64)
    out, attn_weight = nchw(x, ret_attn_mask=True)
    expected, _, _, expected_weight = nhwc(x.permute(0, 2, 3, 1), ret_attn_mask=True)
    assert relative_error(out, expected.permute(0, 3, 1, 2)) < FLOAT64_TOLERANCE
    assert relative_error(attn_weight.transpose(1, 2).flatten(0, 1), expected_weight) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
def test_padding_after_the_projection_equals_padding_before_it_only_without_bias(bias):
    """Attention on a map of 7 x 8 tokens, padded to 9 x 9, with the same grid and graph; n_win=3."""
    projection = nn.Linear(16, 48, bias=bias).double()
    spec = AttentionSpec(16, 16, 2, 3, 4)
    x = torch.randn(1, 7, 8, 16, dtype=torch.float64)
    padded = nn.functional.pad(x, (0, 0, 0, 1, 0, 2))
    before, _, r_idx, _ = reference.attend(Call(projection(padded), spec))
    query, key, value = projection(x).permute(0, 3, 1, 2).chunk(3, 1)
    graph = r_idx[:, None].expand(-1, 2, -1, -1)
    after, _ = _attend_regional(query, key, value, spec.scale, graph, region_size=(3, 3))
    error = relative_error(after, before[:, :7, :8].permute(0, 3, 1, 2))
    assert (error > 1e-3) if bias else (error < FLOAT64_TOLERANCE)


class TestModule:
    @pytest.mark.parametrize(
        ("size", "regions", "tokens"),
        [((9, 12), 9, 12), ((10, 13), 16, 12), ((5, 8), 20, 2)],
        ids=["divisible", "one more region a side", "regions of 1 x 2 tokens"],
    )
    def test_regions_are_as_large_as_n_win_leaves_them_and_may_be_more(self, size, regions, tokens):
        module = NCHWBiLevelRoutingAttention(16, 2, 3, backend="reference")
        out, attn_weight = module(torch.randn(2, 16, *size), ret_attn_mask=True)
        assert out.shape == (2, 16, *size)
        assert attn_weight.shape == (2, 2, regions, tokens, 4 * tokens)

    def test_maps_smaller_than_n_win(self):
        x = torch.randn(1, 16, 1, 2)
        with pytest.raises(ValueError, match=r"at least 3 x 3 tokens \(n_win\), got 1 x 2; auto_pad=True"):
            NCHWBiLevelRoutingAttention(16, 2, 3)(x)
        module = NCHWBiLevelRoutingAttention(16, 2, 3, auto_pad=True, backend="reference")
        out, attn_weight = module(x, ret_attn_mask=True)
        assert out.shape == x.shape
        assert attn_weight.shape == (1, 2, 2, 1, 2)  # two regions of one token, fewer than topk

    def test_routing_is_detached(self):
        """The routing weights need no gradient, although the projection does."""
        module = NCHWBiLevelRoutingAttention(16, 2, 3)
        qkv = module.qkv_linear(torch.randn(1, 16, 6, 6)).permute(0, 2, 3, 1)
        r_weight, _ = reference.route(Call(qkv, module.spec, given_grid=RegionGrid.of_windows(6, 6, 3)))
        assert qkv.requires_grad
        assert not r_weight.requires_grad

    def test_layers_have_the_originals_names_and_shapes(self):
        shapes = {
            k: tuple(v.shape) for k, v in NCHWBiLevelRoutingAttention(16, side_dwconv=5).state_dict().items()
        }
        assert shapes == {
            "lepe.weight": (16, 1, 5, 5),
            "lepe.bias": (16,),
            "qkv_linear.weight": (48, 16, 1, 1),
            "qkv_linear.bias": (48,),
            "output_linear.weight": (16, 16, 1, 1),
            "output_linear.bias": (16,),
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_heads": 3}, "dim must be a multiple of num_heads=3, got 16"),
            ({"topk": 50}, "topk must be at most .* 49 for n_win=7, got 50"),
            ({"side_dwconv": 2}, "side_dwconv must be 0 or an odd kernel size, got 2"),
            ({"qk_scale": 3e38}, "qk_scale must be a number from -1e38 to 1e38"),
            ({"n_win": 0}, "n_win must be an int of at least 1, got 0"),
        ],
    )
    def test_wrong_arguments_are_explained(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            NCHWBiLevelRoutingAttention(16, **arguments)

    @pytest.mark.parametrize("shape", [(1, 8, 8, 16), (16, 8, 8)])
    def test_maps_of_another_shape_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"x must be \(N, dim, H, W\) with dim=16"):
            NCHWBiLevelRoutingAttention(16)(torch.randn(shape))
