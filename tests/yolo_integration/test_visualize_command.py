"""The `bra-visualize` command and pictures of a YOLO: letterboxed images, predictions, errors."""

import numpy as np
import pytest
import torch
from browser import CHROMIUM, opened
from PIL import Image

from bra_triton.visualize import record
from bra_triton.visualize.picture import Picture
from bra_triton.yolo_integration.visualize import main


@pytest.fixture
def image(tmp_path):
    """A file of 150 x 60 pixels, which a YOLO letterboxes to 64 x 32, or without `rect` to 64 x 64."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


@pytest.mark.parametrize("rect", [True, False])
def test_the_original_picture_lies_where_ultralytics_letterboxed_it(image, trained, rect):
    from ultralytics import YOLO
    from ultralytics.utils.ops import scale_boxes

    model = YOLO(trained / "best.pt")
    recording = record(model, str(image), imgsz=64, rect=rect, conf=1e-6, verbose=False)
    picture = Picture.of(recording)
    assert (picture.height, picture.width) == tuple(recording.image.shape[1:]) == ((64, 64), (32, 64))[rect]
    np.testing.assert_array_equal(picture.pixels, np.asarray(Image.open(image)))
    for point in ((0, 0), (149, 59), (75, 10)):
        x, y = picture.place(point)
        back = scale_boxes((picture.height, picture.width), torch.tensor([[x, y, x, y]]), (60, 150))
        # Ultralytics rounds the bars to whole pixels of the network's image; each is 2.3 of the picture's.
        assert back[0, :2].tolist() == pytest.approx(point, abs=2.4)
    (result,) = recording.result
    assert [(each.label, each.confidence) for each in picture.predictions] == [
        (result.names[int(kind)], pytest.approx(float(score)))
        for kind, score in zip(result.boxes.cls, result.boxes.conf, strict=True)
    ]
    assert [layer.name for layer in recording.layers] == ["model.10.m.0.attn.attn", "model.11.attn"]


def test_a_picture_between_predictions_changes_neither_them_nor_the_model(image, trained):
    """A prediction fuses convolutions and norms in a copy of the model that a YOLO keeps for later ones."""
    from ultralytics import YOLO

    model = YOLO(trained / "best.pt")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    (first,) = model(str(image), imgsz=64, conf=1e-6, verbose=False)
    predictor = model.predictor
    for _ in range(2):
        recording = record(model, str(image), imgsz=64, conf=1e-6, verbose=False)
        assert len(recording.layers) == 2
        assert torch.equal(recording.result[0].boxes.data, first.boxes.data)
    assert model.predictor is predictor
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_the_command_writes_a_picture_without_a_display(image, trained, capsys, monkeypatch):
    monkeypatch.chdir(image.parent)
    monkeypatch.delenv("DISPLAY", raising=False)
    arguments = [str(image), "--weights", str(trained / "best.pt"), "--imgsz", "64", "--layer", "model.11"]
    assert main([*arguments, "--point", "20,30"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "street-attention.png"
    with Image.open(image.parent / "street-attention.png") as picture:
        assert picture.width > 700
        assert np.asarray(picture).std() > 10


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_command_writes_a_page(image, trained, tmp_path):
    out = tmp_path / "page.html"
    arguments = [str(image), "--weights", str(trained / "best.pt"), "--imgsz", "64", "--html"]
    assert main([*arguments, "--point", "20,30", "--out", str(out)]) == 0
    with opened(out, tmp_path / "profile") as browser:
        browser.evaluate("ready")
        assert browser.evaluate("document.getElementById('readout').textContent").startswith(
            "Query point 20, 30 "
        )
        # For each of two layers a picture of the routing, and one for each head: four and eight.
        assert browser.evaluate("document.querySelectorAll('canvas').length") == 2 + 4 + 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--point", "20"], "--point: must be x,y, two numbers, got '20'"),
        (["--point", "150,30"], "point must lie in the picture, which has 150 x 60 pixels, got 150"),
        (
            ["--layer", "12"],
            "layers must name some of these, by position or name, got '12':\n  0: model.10.m.0",
        ),
        (["--weights", "none.pt"], "--weights must be a file, got none.pt"),
        # Said before the model runs, not by a traceback after it.
        (["--out", "none/x.png"], "--out must be in a folder that exists, got none/x.png"),
        (["--html", "--out", "x.png"], "--out must end in .html for a page (--html), got x.png"),
    ],
)
def test_wrong_arguments_are_named(image, trained, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main([str(image), "--weights", str(trained / "best.pt"), "--imgsz", "64", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_several_pictures_and_streams_are_refused(image, trained):
    from ultralytics import YOLO

    model = YOLO(trained / "best.pt")
    with pytest.raises(ValueError, match="image must be one image, got 2"):
        record(model, [str(image)] * 2, imgsz=64, verbose=False)
    with pytest.raises(ValueError, match="stream must be False, so that the model runs now, got stream=True"):
        record(model, str(image), stream=True, imgsz=64, verbose=False)
