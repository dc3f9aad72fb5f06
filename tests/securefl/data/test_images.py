"""Images are read in the one size and colour of the schema, and never from outside the folder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from securefl.data.images import ImageError, read_image
from securefl.data.reading import load, read
from securefl.schema import Schema, parse
from securefl.sections import ConfigurationError

SHAPES = """
version = 1
name = "shapes"
label = "shape"
[columns]
shape = {type = "category", categories = ["disc", "square"]}
scan = {type = "image", height = 4, width = 6}
age = {type = "number", range = [0, 120], optional = true}
"""


def shapes(**changes: str) -> Schema:
    text = SHAPES
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse(text)


def grey(seed: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images in two classes' folders."""
    for number, name in enumerate(["disc/a", "disc/b", "square/10", "square/9", "square/x"]):
        save(tmp_path / "shapes" / f"{name}.png", grey(number))
    (tmp_path / "shapes" / ".hidden").write_text("of the file system's own")
    return tmp_path / "shapes"


def refusal(path: Path, schema: Schema) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(path, schema)
    told = str(caught.value)
    assert "\n" not in told
    assert str(path) in told
    return told


def test_a_folder_of_classes_is_read_in_the_order_of_its_names(folder: Path) -> None:
    frame = load(folder, shapes())
    assert frame.codes["shape"].tolist() == [0, 0, 1, 1, 1]
    assert np.isnan(frame.numbers["age"]).all()
    assert frame.images is not None
    assert (frame.images.shape, frame.images.dtype) == ((5, 1, 4, 6), np.uint8)
    for number, image in enumerate(frame.images):
        np.testing.assert_array_equal(image[0], grey(number))
    assert [part.rows for part in read(folder, shapes(), chunk=2)] == [2, 2, 1]


def test_a_table_names_images_relative_to_itself(folder: Path) -> None:
    table = folder / "table.csv"
    table.write_text("age,scan,shape\n5,square/x.png,disc\n6, ./disc/a.png ,square\n")
    frame = load(table, shapes())
    assert (frame.codes["shape"].tolist(), frame.numbers["age"].tolist()) == ([0, 1], [5, 6])
    assert frame.images is not None
    np.testing.assert_array_equal(frame.images[:, 0], [grey(4), grey(0)])


def test_grey_and_colour_become_what_the_schema_says(tmp_path: Path) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
    save(tmp_path / "colour.png", colour)
    save(tmp_path / "grey.png", grey(2))
    three = read_image(tmp_path, "colour.png", 4, 6, 3)
    np.testing.assert_array_equal(three, colour.transpose(2, 0, 1))
    assert three.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(read_image(tmp_path, "grey.png", 4, 6, 3), [grey(2)] * 3)
    luma = colour @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(read_image(tmp_path, "colour.png", 4, 6, 1)[0] - luma).max() <= 1


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(suffix, mode) for suffix in ("png", "tif") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [("bmp", "1"), ("bmp", "P"), ("bmp", "RGB"), ("webp", "RGB"), ("webp", "RGBA")],
)
def test_black_and_white_are_the_same_in_every_kind_of_pixel(
    tmp_path: Path, suffix: str, mode: str
) -> None:
    pixels = np.where(grey(3) > 127, 255, 0).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).convert(mode).save(path, **options)
    np.testing.assert_array_equal(read_image(tmp_path, path.name, 4, 6, 1)[0], pixels)


def bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has 3.6 thousand million pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content))
            for kind, content in chunks
        )
    )  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 0xFF
    path.write_bytes(content)


def replaced(path: Path) -> None:
    path.unlink()
    path.mkdir()


def led_out(path: Path) -> None:
    outside = save(path.parents[2] / "outside.png", grey(0))
    path.unlink()
    path.symlink_to(outside)


def two_frames(path: Path) -> None:
    frames = [Image.fromarray(grey(seed)) for seed in (1, 2)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another size": (lambda path: save(path, grey(0, 6, 4)), ["4 pixels wide and 6 high", "scale"]),
    "a bomb": (bomb, ["too many pixels", "scale"]),
    "cut short": (cut, ["save it again"]),
    "a wrong bit": (flipped, ["save it again"]),
    "empty": (lambda path: path.write_bytes(b""), ["no whole image", "save it again"]),
    "text": (lambda path: path.write_text("image"), ["no whole image", "save it again"]),
    "sixteen bits": (lambda path: save(path, grey(0).astype(np.uint16)), ["I;16", "8 bits"]),
    "two images": (two_frames, ["several images", "save one"]),
    "a folder": (replaced, ["is no file"]),
    "absent": (Path.unlink, ["does not exist", "correct the path"]),
    "a link to the outside": (led_out, ["leaves the folder", "copy"]),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("no")), ["does not exist"]),
    "a link to itself": (
        lambda path: (path.unlink(), path.symlink_to(path)), ["cannot be read", "correct"]),
}  # fmt: skip


@pytest.mark.parametrize(("break_", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_image_is_refused_by_the_table_and_by_the_folder(
    folder: Path, break_: Callable[[Path], object], told: list[str]
) -> None:
    table = folder / "table.csv"
    table.write_text("shape,scan\ndisc,disc/a.png\ndisc,disc/b.png\n")
    break_(folder / "disc" / "b.png")
    said = refusal(table, shapes())
    assert f"{table}: column 'scan', row 2: 'disc/b.png' " in said
    assert [part for part in told if part not in said] == [], said
    table.unlink()
    if (folder / "disc" / "b.png").is_symlink() or (folder / "disc" / "b.png").exists():
        said = refusal(folder, shapes())
        assert "'disc/b.png'" in said
        assert [part for part in told if part not in said] == [], said


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../outside.png", "without .."),
        ("disc/../disc/a.png", "without .."),
        ("/etc/passwd", "relative to the table"),
        ("disc", "no file"),
        ("x" * 5000, "correct the path"),
        ("", "no image is named"),
        ("a\\b.png", "does not exist"),
    ],
)
def test_a_path_that_names_no_image_of_the_folder_is_refused(
    folder: Path, name: str, told: str
) -> None:
    save(folder.parent / "outside.png", grey(0))
    table = folder / "table.csv"
    table.write_text(f"shape,scan\ndisc,disc/a.png\ndisc,{name}\n")
    said = refusal(table, shapes())
    assert "column 'scan', row 2:" in said
    assert told in said


def test_a_folder_that_is_not_of_classes_is_refused(folder: Path) -> None:
    (folder / "notes.txt").write_text("notes")
    assert "notes.txt is in no class's folder" in refusal(folder, shapes())
    (folder / "notes.txt").rename(folder / "disc" / "notes.txt")
    assert "notes.txt is none of .png" in refusal(folder, shapes())
    (folder / "disc" / "notes.txt").unlink()
    (folder / "disc" / "deeper").mkdir()
    assert "deeper is none of .png" in refusal(folder, shapes())
    (folder / "disc" / "deeper").rmdir()
    save(folder / "sqare" / "a.png", grey(0))
    told = refusal(folder, shapes())
    assert "column 'shape', file 'sqare/a.png'" in told
    assert "did you mean 'square'" in told
    (folder.parent / "empty").mkdir()
    assert "no rows" in refusal(folder.parent / "empty", shapes())


def test_a_folder_says_nothing_of_other_columns(folder: Path) -> None:
    needed = shapes(**{", optional = true": ""})
    assert "says nothing of column 'age'" in refusal(folder, needed)
    person = shapes(**{
        'label = "shape"': 'label = "shape"\nperson = "who"',
        "[columns]": '[columns]\nwho = {type = "text", optional = true}',
    })  # fmt: skip
    assert "says nothing of column 'who'" in refusal(folder, person)


@given(content=st.binary(max_size=200), at=st.integers(0, 150), cut=st.integers(0, 40))
@settings(max_examples=150)
def test_bytes_are_an_image_or_an_image_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, at: int, cut: int
) -> None:
    """Whatever Pillow raises for a damaged file."""
    folder = tmp_path_factory.mktemp("bytes")
    whole = save(folder / "a.png", grey(0)).read_bytes()
    (folder / "b.png").write_bytes(whole[:at] + content + whole[at + cut :])
    (folder / "c.png").write_bytes(content)
    for name in ("b.png", "c.png"):
        try:
            assert read_image(folder, name, 4, 6, 1).shape == (1, 4, 6)
        except ImageError:
            continue
