"""Pictures of the attention: recorded weights reproduce the output, and are drawn in the right place."""

import base64
import dataclasses
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, opened
from einops import rearrange
from torch import nn

from bra_triton import BiLevelRoutingAttention, nchwBRA
from bra_triton.modules.permuted import PermutedBiLevelRoutingAttention
from bra_triton.visualize import attention_figure, attention_page, page, record
from bra_triton.visualize.figure import QUERY, ROUTED, regions_of
from bra_triton.visualize.picture import Picture
from bra_triton.visualize.recording import LayerAttention, Recording, choose

PLAIN = {"num_heads": 2, "n_win": 3, "topk": 4, "side_dwconv": 0}
NHWC = {**PLAIN, "param_attention": "qkv", "auto_pad": True}


@pytest.fixture(autouse=True)
def _without_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # pictures come from the reference


def attention(kind=BiLevelRoutingAttention, kv_down=None, **arguments):
    """A module without LePE and output projection, whose output is the weighted sum of the values."""
    if kind is nchwBRA:
        module = nchwBRA(16, **PLAIN)
        nn.init.eye_(module.output_linear.weight.data.view(16, 16))
        nn.init.zeros_(module.output_linear.bias)
    else:
        module = kind(16, **{**NHWC, **arguments})
        module.kv_down = kv_down or module.kv_down
    return module.eval()


def values_of(module, image):
    """The map of values `(dim, H_kv, W_kv)`, padding included, computed without the code under test."""
    call = module.call_of(image)
    grid, dim = call.grid, module.spec.dim
    padded = torch.zeros(grid.rows * grid.region_height, grid.columns * grid.region_width, dim)
    if isinstance(module, BiLevelRoutingAttention):
        padded[:] = module.qkv.qkv.bias[-dim:]  # NCHW pads after the projection
    padded[: grid.height, : grid.width] = call.qkv[0, ..., -dim:]
    value = rearrange(padded, "h w c -> c h w")
    if call.kv_downsampling is not None:
        regions = rearrange(value, "c (j h) (i w) -> (j i) c h w", j=grid.rows, i=grid.columns)
        pooled = nn.functional.adaptive_avg_pool2d(regions, 2)
        value = rearrange(pooled, "(j i) c h w -> c (j h) (i w)", j=grid.rows)
    return value


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (attention(), (1, 12, 9, 16)),  # regions of 4 x 3
        (attention(), (1, 10, 13, 16)),  # padded: the last regions reach past the map
        (attention(n_win=(2, 3)), (1, 12, 9, 16)),  # two rows of three regions
        (attention(soft_routing=True), (1, 12, 9, 16)),
        (attention(kv_downsample_mode="ada_avgpool", kv_per_win=2), (1, 10, 13, 16)),
        (attention(kv_down=nn.AdaptiveAvgPool2d(2)), (1, 10, 13, 16)),  # somebody else's layer
        (attention(PermutedBiLevelRoutingAttention), (1, 16, 10, 13)),
        (attention(nchwBRA), (1, 16, 10, 13)),  # regions of 3 x 4, four by four of them
    ],
    ids=["regions", "padded", "oblong", "soft", "pooled", "replaced", "permuted", "nchw"],
)
def test_the_weights_on_the_map_make_the_output_of_every_token(module, shape):
    image = torch.randn(shape)
    with torch.no_grad():
        out = module(image)[0]
        values = rearrange(values_of(module, image), "(m c) h w -> m c h w", m=2)
    (layer,) = record(module, image).layers
    if shape[1] == 16:
        out = rearrange(out, "c h w -> h w c")
    height, width, _ = out.shape
    for row, column in np.ndindex(height, width):
        # The middle of a token, as fractions of the map.
        region, token = layer.locate((column + 0.5) / width, (row + 0.5) / height)
        assert layer.grid.token(region, token) == row * width + column
        heat = layer.heat(region, token)
        assert heat.isfinite().sum() == layer.weights.shape[0] * layer.weights.shape[-1]
        summed = torch.einsum("mhw,mchw->mc", heat.nan_to_num(), values).flatten()
        torch.testing.assert_close(summed, out[row, column])


def network(attention_module=None):
    """A network with two attention layers, and a batch norm, whose statistics a recording must not change."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 8, stride=8),
        nn.BatchNorm2d(16),
        attention_module or nchwBRA(16, **PLAIN),
        nn.ModuleDict({"b": nchwBRA(16, num_heads=4, n_win=2, topk=1)})["b"],
    )


class Bypass(nn.Sequential):
    def forward(self, x):
        return x


IMAGE = torch.rand(3, 80, 104)  # maps of 10 x 13 tokens


def test_recording_leaves_the_model_as_it_was():
    model = network()
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    recording = record(model, IMAGE)
    assert [layer.name for layer in recording.layers] == ["2", "3"]
    assert torch.equal(recording.image, IMAGE)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not recording.result.requires_grad
    model.eval()
    assert torch.equal(recording.result, model(IMAGE[None]))
    model[3] = nn.Conv2d(17, 17, 1)
    with pytest.raises(RuntimeError):
        record(model, IMAGE)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model.training


class Branches(nn.Module):
    """Calls its first layer, its second and its first again; with a black image the first alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = attention(), attention()
        for layer in self.children():
            nn.init.zeros_(layer.qkv.qkv.bias)  # so that a black image stays black

    def forward(self, x):
        x = self.first(x)
        return self.first(self.second(x)) if x.any() else x


class WarmedUp(nn.Module):
    """Calls its network twice, as a YOLO does that warms up, and returns a list, as a YOLO does."""

    predictor = None

    def __init__(self):
        super().__init__()
        self.model = Branches()

    def forward(self, image, black_last=False):
        images = [image, torch.zeros_like(image)]
        return [self.model(each) for each in (images if black_last else reversed(images))][-1:]


def test_layers_come_in_the_order_in_which_they_ran_last():
    model, x = Branches(), torch.randn(1, 12, 9, 16)
    first, second = model.children()
    recorded = record(model, x).layers
    assert [layer.name for layer in recorded] == ["second", "first"]
    expected = LayerAttention.of("first", first.call_of(second(first(x))))
    assert torch.equal(recorded[1].weights, expected.weights)


@pytest.mark.parametrize(("black_last", "names"), [(False, ["second", "first"]), (True, ["first"])])
def test_only_the_last_call_of_the_network_is_recorded(black_last, names):
    recorded = record(WarmedUp(), torch.randn(1, 12, 9, 16), black_last=black_last).layers
    assert [layer.name for layer in recorded] == names


def test_a_layer_that_is_called_predictor_makes_no_yolo():
    """A `YOLO` has an attribute of this name, and its network in another one."""
    model = nn.Sequential()
    model.add_module("predictor", attention())
    assert [layer.name for layer in record(model, torch.randn(1, 12, 9, 16)).layers] == ["predictor"]


def test_a_row_is_not_the_rows_whose_number_begins_alike():
    assert choose(["model.1.attn", "model.10.attn"], ["model.1"]) == ["model.1.attn"]


def test_the_corners_of_the_map_are_in_its_first_and_last_region():
    (layer,) = record(attention(), torch.randn(1, 12, 9, 16)).layers
    assert layer.locate(0, 0) == (0, 0)
    assert layer.locate(1, 1) == (8, 11)  # regions of 4 x 3 tokens


def test_a_pooling_of_another_dtype_is_recorded():
    module = attention(kv_downsample_mode="conv", kv_downsample_ratio=2)
    module.kv_down.double()
    (layer,) = record(module, torch.randn(1, 12, 9, 16)).layers
    assert (layer.kv_grid.region_height, layer.kv_grid.region_width) == (2, 1)


@pytest.mark.parametrize(("layers", "names"), [(["0"], "2"), ([1], "3"), (["3", "2"], "23"), (None, "23")])
def test_layers_are_chosen_by_position_and_name(layers, names):
    assert "".join(layer.name for layer in record(network(), IMAGE, layers).layers) == names


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, IMAGE), TypeError, "model must be an nn.Module or a YOLO of Ultralytics, got None"),
        ((nn.Conv2d(3, 3, 1), IMAGE), ValueError, "model must hold a BiLevelRoutingAttention or"),
        ((network(), "bus.jpg"), TypeError, "image must be a tensor for a model that is not a YOLO, got str"),
        ((network(), IMAGE.expand(2, -1, -1, -1)), ValueError, "image must be one image, got 2"),
        ((network(), IMAGE, ["model.9"]), ValueError, r"got 'model.9':\n  0: 2\n  1: 3"),
        (
            (network(), IMAGE, [2.5]),
            ValueError,
            "layers must name some of these, by position or name, got 2.5",
        ),
        # It chose the layers "3" and "2", as it would have chosen 1 and 0 for "10".
        ((network(), IMAGE, "32"), TypeError, "layers must be a list of positions and names, got '32'"),
        ((network(), IMAGE, 1), TypeError, "layers must be a list of positions and names, got 1"),
        ((network(), IMAGE, []), ValueError, r"layers must include one that runs for this image, got \[\]"),
        ((Bypass(network()), IMAGE), ValueError, r"layers must include one .*, got \['0.2', '0.3'\]"),
    ],
)
def test_what_cannot_be_recorded_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        record(*arguments)


@pytest.mark.parametrize("point", [(-1, 5), (104, 5), (5, 80)])
def test_a_point_outside_is_refused(point):
    with pytest.raises(ValueError, match="point must lie in the picture, which has 104 x 80 pixels, got"):
        attention_figure(network(), IMAGE, point=point)


@pytest.mark.parametrize("point", ["centre", (1,), (1, 2, 3), 5, ("a", "b")])
def test_a_point_that_is_not_two_numbers_is_refused(point):
    with pytest.raises(ValueError, match=r"point must be x and y, two numbers, got .*"):
        attention_figure(network(), IMAGE, point=point)


def boxes(axes, colour):
    """The rectangles of a colour, as (left, top, width, height)."""
    from matplotlib.colors import to_rgba

    patches = [patch for patch in axes.patches if patch.get_edgecolor() == to_rgba(colour)]
    return sorted((*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in patches)


def test_the_figure_shows_the_query_region_the_routed_ones_and_the_weights(tmp_path):
    model, point = network(), (100, 30)
    figure = attention_figure(model, IMAGE, point=point)
    figure.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    recording = record(model, IMAGE)
    panels = [axes for axes in figure.axes if axes.get_title()][:4]
    for layer, (routing, heat) in zip(recording.layers, (panels[:2], panels[2:]), strict=True):
        query = layer.locate(100 / 104, 30 / 80)
        regions = [*regions_of(Picture.of(recording), layer)]
        assert boxes(routing, QUERY) == [regions[query[0]]]
        left, top, wide, high = regions[query[0]]
        assert left <= 100 <= left + wide
        assert top <= 30 <= top + high
        assert boxes(routing, ROUTED) == sorted(regions[index] for index in layer.r_idx[query[0]])
        written = {text.get_text() for text in routing.texts}
        assert written == {f"{weight:.2f}" for weight in layer.r_weight[query[0]]}
        shown = heat.images[-1].get_array()
        expected = np.ma.masked_invalid(100 * layer.heat(*query).mean(0))
        np.testing.assert_allclose(shown.filled(-1), expected.filled(-1))
        wide, high = Picture.of(recording).extent(layer)
        assert heat.images[-1].get_extent() == [0, wide, high, 0]


def test_pixels_of_any_range_and_number_of_channels_are_shown():
    for image in (torch.randn(3, 80, 104), torch.rand(1, 80, 104), torch.randn(5, 80, 104)):
        model = network()
        model[0] = nn.Conv2d(len(image), 16, 8, stride=8)
        pixels = Picture.of(record(model, image)).pixels
        assert pixels.shape == (80, 104, 3)
        assert pixels.std() > 10


@pytest.mark.filterwarnings("error")
def test_pixels_above_one_are_rescaled():
    image = torch.rand(3, 80, 104)
    image = (image - image.min()) / (image.max() - image.min())
    pixels, expected = (Picture.of(record(network(), x)).pixels.astype(int) for x in (255 * image, image))
    assert np.abs(pixels - expected).max() <= 1
    assert not Picture.of(record(network(), torch.full((3, 80, 104), 2.0))).pixels.any()


def test_the_prediction_with_the_highest_confidence_is_the_query_point():
    boxes = SimpleNamespace(
        cls=torch.tensor([0.0, 1.0]),
        conf=torch.tensor([0.2, 0.9]),
        xyxy=torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 4.0, 6.0]]),
    )
    photo = np.zeros((16, 8, 3), np.uint8)
    result = SimpleNamespace(boxes=boxes, names={0: "cat", 1: "dog"}, orig_img=photo)
    picture = Picture.of(Recording(result, torch.zeros(3, 16, 8), []))
    assert [each.label for each in picture.predictions] == ["dog", "cat"]
    assert picture.place(None) == (3, 4)


def test_a_classifiers_picture_is_what_it_cropped():
    result = SimpleNamespace(probs=torch.ones(2), orig_img=np.zeros((16, 8, 3), np.uint8))
    picture = Picture.of(Recording(result, torch.zeros(3, 4, 4), []))
    assert picture.pixels.shape == (4, 4, 3)


def test_no_name_ends_the_script_of_a_page():
    model = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8))
    model.add_module("</script>", nchwBRA(16, **PLAIN))
    plain = nn.Sequential(*model.children())
    assert attention_page(model, IMAGE).count("</script>") == attention_page(plain, IMAGE).count("</script>")


def test_a_page_of_too_many_weights_is_refused(monkeypatch):
    monkeypatch.setattr(page, "MOST_BYTES", 2**10)
    with pytest.raises(ValueError, match=r"layers must have at most 0 MiB .* got 0 \(2: 0 MiB, 3: 0 MiB\)"):
        attention_page(network(), IMAGE)


def test_a_page_keeps_the_numbers_of_more_regions_than_two_bytes_count():
    """The reference takes as many as memory allows: 257 x 257 regions of one token, for example."""
    layer = record(network(), IMAGE).layers[0]
    far = dataclasses.replace(layer, r_idx=layer.r_idx + 2**16)
    packed = page._described(far)["routes"]
    found = np.frombuffer(zlib.decompress(base64.b64decode(packed)), "<u4")
    assert found.tolist() == far.r_idx.flatten().tolist()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_follows_the_pointer_in_a_browser(tmp_path):
    model = network(
        attention(PermutedBiLevelRoutingAttention, kv_downsample_mode="ada_avgpool", kv_per_win=2)
    )
    file = tmp_path / "attention.html"
    file.write_text(attention_page(model, IMAGE, point=(20, 60)), "utf-8")
    layers = record(model, IMAGE).layers
    with opened(file, tmp_path / "profile") as browser:
        browser.evaluate("ready")
        captions = "[...document.querySelectorAll('figcaption')].map(each => each.textContent)"
        assert browser.evaluate(captions) == captions_of(layers, (20, 60))
        # The second picture of the second layer. The layer's regions are 18 tokens of 8 pixels wide together.
        scale = 260 / 144
        left, top = browser.evaluate(
            "(({x, y}) => [x, y])(document.querySelectorAll('canvas')[4].getBoundingClientRect())"
        )
        for x, y in ((3, 3), (97, 73), (50, 42)):
            browser.move(left + scale * x, top + scale * y)
            assert browser.evaluate(captions) == captions_of(layers, (x, y))
        assert "Query point 50, 42" in browser.evaluate("document.getElementById('readout').textContent")
        # A click holds the query point; then the pointer reads the weights of keys.
        browser.move(left + scale * 50, top + scale * 42, click=True)
        browser.move(left + scale * 24, top + scale * 23)
        assert browser.evaluate(captions) == captions_of(layers, (50, 42), pointer=(24, 23))
        assert browser.evaluate("document.getElementById('readout').textContent").endswith(", held")
        # Red marks the query point, and nothing else in a picture of noise is as red.
        pixel = "[...document.querySelectorAll('canvas')[4].getContext('2d').getImageData(90, 76, 1, 1).data]"
        assert browser.evaluate(pixel) == [255, 65, 54, 255]
        assert browser.evaluate("performance.getEntriesByType('resource').length") == 0


def captions_of(layers, point, pointer=None):
    """The captions that the page must have under its pictures, from the recorded numbers."""
    captions = []
    for layer in layers:
        region, token = layer.locate(point[0] / 104, point[1] / 80)
        routed = ", ".join(str(int(index)) for index in layer.r_idx[region])
        captions.append(f"region {region} to {routed}")
        heat = layer.heat(region, token)
        x, y = pointer or point
        grid, (_, rows, columns) = layer.grid, heat.shape
        row = int(y / 8 / (grid.rows * grid.region_height) * rows)  # a token is 8 pixels wide
        column = int(x / 8 / (grid.columns * grid.region_width) * columns)
        for head, weights in enumerate(layer.weights[:, region, token]):
            peak, here = float(weights.max()), float(heat[head, row, column])
            level = round(here / peak * 255) / 255 * peak if here == here else None
            text = "none" if level is None else f"{100 * level:.2f} %"
            captions.append(f"head {head}: largest {100 * peak:.2f} %, {text} at the pointer")
    return captions
