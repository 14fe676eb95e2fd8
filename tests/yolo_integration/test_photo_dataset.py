import dataclasses
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from bra_triton.yolo_integration import photo_dataset
from bra_triton.yolo_integration.photo_dataset import draw_boxes, load_photos, main, write_photo_dataset

NAMES, PHOTOS = load_photos()


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(root)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in root.rglob("*")
        if file.is_file()
    }


def contents(root: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in snapshot(root).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    assert write_photo_dataset(root) == root.resolve() / "data.yaml"
    return root


def test_at_least_eight_different_photographs():
    assert (
        len({photo.sha256 for photo in PHOTOS}) == len({photo.name for photo in PHOTOS}) == len(PHOTOS) >= 8
    )


def test_every_photograph_names_its_author_source_and_licence():
    for photo in PHOTOS:
        assert photo.author
        assert photo.source
        assert photo.licence.lower() not in {"", "unknown"}
        sources = Path(photo_dataset.__file__).with_name("photos") / "SOURCES.md"
        assert f"`{photo.name}` ({photo.width}x{photo.height}" in sources.read_text()


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.name)
def test_boxes_lie_inside_their_picture(photo, written):
    from PIL import Image

    with Image.open(written / "images" / photo.name) as picture:
        assert picture.size == (photo.width, photo.height)
    assert photo.boxes
    assert len(set(photo.boxes)) == len(photo.boxes)
    for _, x1, y1, x2, y2 in photo.boxes:
        assert 0 <= x1 < x2 <= photo.width
        assert 0 <= y1 < y2 <= photo.height


def test_names_are_the_classes_present_in_coco_order():
    import yaml

    coco = Path(
        importlib.util.find_spec("ultralytics").submodule_search_locations[0], "cfg/datasets/coco.yaml"
    )
    order = list(yaml.safe_load(coco.read_text(encoding="utf-8"))["names"].values())
    used = {box[0] for photo in PHOTOS for box in photo.boxes}
    assert [name for name in order if name in used] == NAMES
    assert used == set(NAMES)


def test_layout(written):
    import yaml

    assert {file.name for file in (written / "images").iterdir()} == {photo.name for photo in PHOTOS}
    assert {file.stem for file in (written / "labels").iterdir()} == {
        Path(photo.name).stem for photo in PHOTOS
    }
    data = yaml.safe_load((written / "data.yaml").read_text())
    assert data == {"train": "images", "val": "images", "names": dict(enumerate(NAMES))}


def test_ultralytics_reads_back_every_box(tmp_path):
    from ultralytics.data import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(write_photo_dataset(tmp_path)), autodownload=False)
    dataset = YOLODataset(img_path=data["train"], data=data, task="detect", augment=False, imgsz=64)
    read = {Path(label["im_file"]).name: label for label in dataset.labels}
    assert read.keys() == {photo.name for photo in PHOTOS}
    for photo in PHOTOS:
        label = read[photo.name]
        assert label["shape"] == (photo.height, photo.width)
        assert [NAMES[int(index)] for index in label["cls"][:, 0]] == [box[0] for box in photo.boxes]
        for (_, *corners), (x, y, w, h) in zip(photo.boxes, label["bboxes"].tolist(), strict=True):
            back = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            sizes = (photo.width, photo.height) * 2
            assert corners == pytest.approx([b * size for b, size in zip(back, sizes, strict=True)], abs=0.01)


def test_second_run_writes_nothing(tmp_path):
    write_photo_dataset(tmp_path)
    before = snapshot(tmp_path)
    write_photo_dataset(tmp_path)
    assert snapshot(tmp_path) == before


def test_half_written_set_is_repaired(tmp_path, written):
    write_photo_dataset(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "labels" / "coffee.txt").unlink()
    (tmp_path / "labels" / "zidane.txt").write_text("0 0.5 0.5 1 1\n")
    picture = tmp_path / "images" / "bus.jpg"
    picture.write_bytes(picture.read_bytes()[:1000])
    (tmp_path / "labels.cache").write_bytes(b"cache of the old labels")
    write_photo_dataset(tmp_path)
    assert contents(tmp_path) == contents(written)


def test_interrupted_run_is_completed_by_the_next(tmp_path, written, monkeypatch):
    replace = os.replace
    calls = []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 5:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_photo_dataset(tmp_path)
    assert not (tmp_path / "data.yaml").exists()
    write_photo_dataset(tmp_path)
    assert contents(tmp_path) == contents(written)


def test_other_pictures_are_refused_and_kept(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"holiday\.jpg"):
        write_photo_dataset(tmp_path)
    assert contents(tmp_path) == {"images/holiday.jpg": b"mine"}


def test_missing_package(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(photo_dataset, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(
        ModuleNotFoundError, match=r"scikit-image.*pip install scikit-image matplotlib"
    ) as error:
        write_photo_dataset(tmp_path)
    assert error.value.name == "skimage"
    assert not list(tmp_path.iterdir())


def test_changed_or_missing_picture(tmp_path, monkeypatch):
    package = tmp_path / "matplotlib"
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    find = importlib.util.find_spec
    monkeypatch.setattr(photo_dataset, "find_spec", lambda name: spec if name == "matplotlib" else find(name))
    with pytest.raises(FileNotFoundError, match=r"matplotlib .*grace_hopper\.jpg"):
        write_photo_dataset(tmp_path / "data")

    photo = next(photo for photo in PHOTOS if photo.package == "matplotlib")
    picture = package / photo.path
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"another picture")
    with pytest.raises(RuntimeError, match=rf"grace_hopper\.jpg of matplotlib .*{photo.sha256}"):
        write_photo_dataset(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_unlisted_class_is_an_error():
    photo = dataclasses.replace(PHOTOS[0], boxes=[("unicorn", 0, 0, 1, 1)])
    with pytest.raises(ValueError, match="unicorn"):
        photo.label(NAMES)


def test_drawings_show_the_boxes(tmp_path, written):
    from PIL import Image

    drawings = draw_boxes(written, tmp_path, scale=2)
    assert [drawing.stem for drawing in drawings] == [Path(photo.name).stem for photo in PHOTOS]
    for photo, drawing in zip(PHOTOS, drawings, strict=True):
        _, x1, y1, x2, y2 = photo.boxes[0]
        with Image.open(drawing) as picture:
            assert picture.size == (2 * photo.width, 2 * photo.height)
            for edge in (2 * x1, 2 * x2 - 1):
                row = [
                    picture.getpixel((x, y1 + y2))
                    for x in range(max(edge - 1, 0), min(edge + 2, picture.width))
                ]
                assert (255, 0, 0) in row, (photo.name, edge)


def test_command_line(tmp_path, capsys):
    main([str(tmp_path)])
    assert (tmp_path / "data.yaml").is_file()
    assert len(list((tmp_path / "drawings").glob("*.png"))) == len(PHOTOS)
    printed = capsys.readouterr().out
    assert all(photo.name in printed and photo.licence in printed for photo in PHOTOS)
