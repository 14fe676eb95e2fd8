"""A small detection data set of real photographs that installed packages ship; nothing is downloaded.

`photos/photos.json` lists the pictures (package, licence, checksum) and the boxes drawn by hand;
`photos/SOURCES.md` describes them. To look at the boxes:

python -m bra_triton.yolo_integration.photo_dataset OUT_DIR
"""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install scikit-image matplotlib"
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Photo:
    """One photograph and its boxes.

    Attributes:
        package: import name of the package that ships it.
        distribution: the package's name for pip.
        path: the file, relative to the package.
        author: who took it.
        source: where it comes from.
        licence: its licence.
        width: in pixels.
        height: in pixels.
        sha256: checksum of the file on which the boxes were drawn.
        boxes: class names of COCO, each with x1, y1, x2, y2 in pixels from the top left corner.
    """

    package: str
    distribution: str
    path: str
    author: str
    source: str
    licence: str
    width: int
    height: int
    sha256: str
    boxes: list[tuple[str, float, float, float, float]]

    @property
    def name(self) -> str:
        """File name of the picture, both in its package and in the data set."""
        return Path(self.path).name

    def read(self) -> bytes:
        """The content of the picture's file; the package is not imported.

        Raises:
            ModuleNotFoundError: if the package is not installed.
            FileNotFoundError: if the installed package has no such picture.
            RuntimeError: if the picture in the installed package is not the one that the boxes were drawn on.
        """
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{self.name} comes with {self.distribution}, which is not installed: {INSTALL}",
                name=self.package,
            )
        file = Path(spec.submodule_search_locations[0], self.path)
        if not file.is_file():
            raise FileNotFoundError(f"{self.distribution} {self._version()} has no {self.path}: {INSTALL}")
        content = file.read_bytes()
        if (digest := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise RuntimeError(
                f"{self.name} of {self.distribution} {self._version()} is not the picture the boxes were "
                f"drawn on: sha256 {digest}, expected {self.sha256}; install another release of "
                f"{self.distribution}"
            )
        return content

    def label(self, names: list[str]) -> str:
        """The label file: a line `class x y w h` for each box, as fractions of the picture's size."""
        return "".join(
            f"{names.index(name)} {(x1 + x2) / 2 / self.width:.6f} {(y1 + y2) / 2 / self.height:.6f} "
            f"{(x2 - x1) / self.width:.6f} {(y2 - y1) / self.height:.6f}\n"
            for name, x1, y1, x2, y2 in self.boxes
        )

    def _version(self) -> str:
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "(version unknown)"


def load_photos() -> tuple[list[str], list[Photo]]:
    """The class names, in COCO's order, and the photographs."""
    content = json.loads(resources.files(__package__).joinpath("photos/photos.json").read_text("utf-8"))
    photos = [Photo(**{**item, "boxes": [tuple(box) for box in item["boxes"]]}) for item in content["photos"]]
    return content["names"], photos


def write_photo_dataset(root: Path) -> Path:
    """Writes the data set to the folder `root`; returns the absolute path of its `data.yaml`.

    The layout is Ultralytics' (`images/`, `labels/`, `data.yaml`); training and validation use the
    same pictures. Files that already have the right content stay as they are, and every other file is
    replaced in one step, so the next run completes an interrupted one.

    Raises:
        ModuleNotFoundError, FileNotFoundError, RuntimeError: see `Photo.read`.
        FileExistsError: if `root/images` holds pictures that are not part of the data set.
    """
    root = Path(root).resolve()
    names, photos = load_photos()
    files: dict[Path, bytes] = {}
    for photo in photos:
        files[root / "images" / photo.name] = photo.read()
        files[root / "labels" / f"{Path(photo.name).stem}.txt"] = photo.label(names).encode()
    # Without a "path" entry Ultralytics looks for images/ beside the yaml, so the folder can be moved.
    lines = ["train: images", "val: images", "names:", *(f"  {i}: {name}" for i, name in enumerate(names))]
    files[root / "data.yaml"] = "\n".join([*lines, ""]).encode()

    found = [file for file in (root / "images").glob("*") if file.suffix.lower() in SUFFIXES]
    if extra := sorted(file.name for file in found if file not in files):
        raise FileExistsError(
            f"{root / 'images'} holds other pictures ({', '.join(extra)}): use another folder"
        )

    for file, content in files.items():
        if file.is_file() and file.read_bytes() == content:
            continue
        # Ultralytics' label cache does not notice every change of a label file, so it is deleted.
        (root / "labels.cache").unlink(missing_ok=True)
        _replace(file, content)
    return root / "data.yaml"


def _replace(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def draw_boxes(root: Path, out_dir: Path, scale: int = 2) -> list[Path]:
    """Draws the boxes of the label files in `root` over their pictures, enlarged `scale` times.

    The data set must have been written. Returns the PNG files in `out_dir`, one for each photograph.
    """
    from PIL import Image, ImageDraw

    colours = ["red", "cyan", "lime", "yellow", "magenta", "orange"]
    names, photos = load_photos()
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for photo in photos:
        stem = Path(photo.name).stem
        with Image.open(root / "images" / photo.name) as opened:
            picture = opened.convert("RGB").resize((opened.width * scale, opened.height * scale))
        draw = ImageDraw.Draw(picture)
        for i, line in enumerate((root / "labels" / f"{stem}.txt").read_text().splitlines()):
            x, y, w, h = (float(value) for value in line.split()[1:])
            left, top = (x - w / 2) * picture.width, (y - h / 2) * picture.height
            # One pixel less, so that an edge on the picture's border stays visible.
            right, bottom = (x + w / 2) * picture.width - 1, (y + h / 2) * picture.height - 1
            colour = colours[i % len(colours)]
            draw.rectangle((left, top, right, bottom), outline=colour)
            text = names[int(line.split()[0])]
            corner = (left + 2, max(top - 14, 2))  # above the box, so that small objects stay visible
            draw.rectangle(draw.textbbox(corner, text), fill="black")
            draw.text(corner, text, fill=colour)
        written.append(out_dir / f"{stem}.png")
        picture.save(written[-1])
    return written


def main(arguments: list[str] | None = None) -> None:
    """Writes the data set and drawings of its boxes, and prints where the photographs come from."""
    command = "python -m bra_triton.yolo_integration.photo_dataset"
    parser = argparse.ArgumentParser(prog=command, description=main.__doc__)
    parser.add_argument(
        "out_dir", type=Path, help="folder of the data set; the drawings go to OUT_DIR/drawings"
    )
    root = parser.parse_args(arguments).out_dir
    data = write_photo_dataset(root)
    drawings = draw_boxes(root, root / "drawings")
    for photo in load_photos()[1]:
        size = f"{photo.width}x{photo.height}"
        print(f"{photo.name:20} {size:9} {len(photo.boxes)} boxes  {photo.distribution:12}  {photo.licence}")
    print(f"\ndata set: {data}\ndrawings: {drawings[0].parent}")


if __name__ == "__main__":
    main()
