"""Open images that others made. Every image of a user, a data set or a visitor is opened here.

All errors of decoders become a ValueError. Sizes are checked before anything is decoded: a file of
20 kB can hold an image of gigabytes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, ImageOps

from . import errors
from .files import open_regular


_Result = TypeVar("_Result")
MEGA = 10**6
MOVING = "hf_intervene_moving"
# These are not opened. Pillow would start Ghostscript, a programming language, for EPS, and reads
# only the header of the others.
_NEVER = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF", "PDF"}
Image.init()
FORMATS = tuple(sorted(set(Image.OPEN) - _NEVER))  # formats that are opened
READABLE = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS
)


def open_image(path: str | os.PathLike, max_pixels: int | None = None) -> Image.Image:
    """Open an image file, decode it, and rotate it as its camera says.

    Args:
        path: a regular file.
        max_pixels: the largest width times height; `None` means `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        OSError: there is no such file, it is a folder, or it may not be read.
        ValueError: it is not a regular file or not an image, is damaged, or is too large.
    """
    with _opened(path) as file:
        return decode_image(file, printable(Path(path).name), max_pixels)


def open_frames(path: str | os.PathLike, frames: int) -> list[Image.Image]:
    """So many frames of a clip's file, evenly spaced; errors as of `open_image` and
    `decode_frames`."""
    with _opened(path) as file:
        content = file.read()
    return decode_frames([content], frames, printable(path))


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A regular file, with errors of `open_image`."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {printable(path)}.") from None
    except OSError as error:
        raise type(error)(f"{printable(path)} is a folder, or may not be read.") from error


def decode_image(source: bytes | BinaryIO, what: str, max_pixels: int | None = None) -> Image.Image:
    """Decode the contents of an image file, and rotate the image as its camera says.

    The image is the first frame. Its `info[MOVING]` says whether there are more: to count them
    takes seconds for some files. A second photo that a camera stores in a JPEG is not a frame.

    Args:
        source: the contents.
        what: how a message names the image.
        max_pixels: see `open_image`.

    Raises:
        ValueError: it is not an image, is damaged, or is too large.
    """
    file = BytesIO(source) if isinstance(source, bytes) else source
    image: Image.Image = _decoded(lambda: Image.open(file, formats=FORMATS), what)
    check_size(image, what, max_pixels)
    moving = image.format != "MPO"
    moving = moving and _decoded(lambda: getattr(image, "is_animated", False), what)
    image = upright(image, what)
    image.info[MOVING] = moving
    return image


def decode_frames(
    sources: Sequence[bytes], frames: int, what: str, max_pixels: int | None = None
) -> list[Image.Image]:
    """Decode the frames of a clip, evenly spaced from its first to its last.

    Args:
        sources: the contents of one file with several frames (GIF, WebP, APNG, TIFF), or of one
            file for each frame, in order.
        frames: how many are wanted.
        what: how a message names the clip.
        max_pixels: of all frames that are wanted together; see `open_image`.

    Raises:
        ValueError: there are fewer frames, or see `decode_image`.
    """
    if len(sources) == 1:
        clip: Image.Image = _decoded(lambda: Image.open(BytesIO(sources[0]), formats=FORMATS), what)
        count = _decoded(lambda: getattr(clip, "n_frames", 1), what)
    else:
        count = len(sources)
    if count < frames:
        raise ValueError(
            f"{what} has {count} frames, and {frames} are wanted: lower frames, or remove it."
        )
    picks = [round(n * (count - 1) / max(frames - 1, 1)) for n in range(frames)]
    if len(sources) > 1:
        found = [decode_image(sources[n], what, max_pixels) for n in picks]
        if any(image.info[MOVING] for image in found):
            raise ValueError(
                f"{what} is a folder of files with several frames each: give each of them as a clip"
                " of its own, outside of such a folder."
            )
        return found
    check_size(clip, what, max_pixels)

    def frame(number: int) -> Image.Image:
        clip.seek(number)
        return clip.copy()

    return [_decoded(partial(frame, number), what) for number in picks]


def upright(image: Image.Image, what: str = "the image") -> Image.Image:
    """Decode an image if necessary, and rotate it as its camera says.

    Raises:
        ValueError: the image is damaged.
    """

    def load() -> Image.Image:
        image.load()
        return ImageOps.exif_transpose(image)

    return _decoded(load, what)


def _decoded(decode: Callable[[], _Result], what: str) -> _Result:
    try:
        return decode()
    except Image.DecompressionBombError as error:  # from Pillow, at twice its MAX_IMAGE_PIXELS
        raise ValueError(f"{what} is too large: {' '.join(str(error).split())}") from error
    except MemoryError as error:
        raise ValueError(
            f"{what} needs more memory than there is: make the image smaller."
        ) from error
    except Exception as error:  # decoders raise IndexError, struct.error, SyntaxError and others
        raise ValueError(
            f"{what} cannot be read as an image: it is damaged or of another kind; replace or"
            " remove it."
        ) from error


def check_size(image: Image.Image, what: str, max_pixels: int | None = None) -> None:
    """Raise a ValueError if an image has more than `max_pixels` pixels, before it is decoded."""
    most = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if most is not None and image.width * image.height > most:
        raise ValueError(
            f"{what} has {image.width}x{image.height} pixels,"
            f" {image.width * image.height / MEGA:.0f} megapixels, and at most {most / MEGA:.0f}"
            " are read: make it smaller."
        )


def flat_image(image: Image.Image, channels: int, what: str = "the image") -> Image.Image:
    """Return an image with 1 (grey) or 3 (RGB) channels of 8 bits, on a white background.

    Raises:
        ValueError: the image has more than 8 bits a channel, which Pillow would clip to white.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{what} has more than 8 bits a channel (mode {image.mode}): scale it to 8 bits first."
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


def printable(name: str | os.PathLike) -> str:
    """Return a file name for a message. Characters that cannot be printed become escapes."""
    return errors.printable(os.fspath(name))
