"""Images from files, in the one size and the one kind of colour that a schema says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What is opened, by Pillow's names. No other of its parsers ever sees a file."""

SUFFIXES: Final = (
    ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip

MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Eight bits a channel: others would be cut off without a word."""


class ImageError(ValueError):
    """What is wrong with an image and how to mend it, as a sentence without its subject."""


def read_image(
    folder: Path, name: str, height: int, width: int, channels: Literal[1, 3]
) -> NDArray[np.uint8]:
    """The image in the file `name`, relative to `folder`: uint8[channels, height, width].

    Colour becomes grey by ITU-R BT.601's luma, grey becomes three equal channels; transparency is
    dropped. Nothing outside `folder` is opened. Raises ImageError.
    """
    from PIL import Image

    path = _within(folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its size is looked at before a pixel is decoded
            with Image.open(path, formats=FORMATS) as image:
                if image.size != (width, height):
                    raise ImageError(
                        f"is {image.size[0]} pixels wide and {image.size[1]} high, the schema says "
                        f"{width} and {height}: scale it"
                    )
                if image.mode not in MODES:
                    raise ImageError(
                        f"has pixels of the kind {image.mode}: convert it to 8 bits a channel"
                    )
                if getattr(image, "n_frames", 1) != 1:
                    raise ImageError("holds several images: save one of them")
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)
    except ImageError:
        raise
    except OSError as error:
        told = error.strerror or "is no whole image"
        raise ImageError(f"cannot be read ({told}): save it again") from None
    except Image.DecompressionBombError:
        raise ImageError("has far too many pixels: scale it") from None
    except Exception as error:  # a damaged file makes Pillow raise errors of a dozen kinds
        raise ImageError(f"is damaged ({type(error).__name__}): save it again") from None
    return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1))


def _within(folder: Path, name: str) -> Path:
    """Where the file is; ImageError for one that is not below `folder`, or is no file."""
    if "\0" in name:
        raise ImageError("is no path: correct it")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ImageError("leaves the folder: give its path relative to the table, without ..")
    try:
        base, path = folder.resolve(strict=True), (folder / name).resolve(strict=True)
        is_file = path.is_file()
    except FileNotFoundError:
        raise ImageError(
            "does not exist: correct the path, which is relative to the table"
        ) from None
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ImageError(f"cannot be read ({type(error).__name__}): correct the path") from None
    if not path.is_relative_to(base):
        raise ImageError("is a link that leaves the folder: copy the image there")
    if not is_file:
        raise ImageError("is no file: correct the path")
    return path
