"""Image files: whether one can be used, told from its headers and its end, and its pixels as viewers show them."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

from ..errors import MixLoraError
from ..limits import how_to_raise, limits
from .conversations import images_of

HEADERS, FULL, NONE = CHECKS = ("headers", "full", "none")
"""How far images are checked: headers and ends, every pixel (slow), or not at all."""
FLOATING_POINT = "F"
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
TAIL = 1 << 16  # bytes in which a JPEG's end is looked for: cameras append thumbnails and notes


def open_image(path: str | Path, padded: bool = False) -> Image.Image:
    """The image as RGB of 8 bits, turned as its EXIF orientation says; 16 bits of gray are scaled, not clipped.

    Args:
        path: the file.
        padded: whether it will be padded to a square, whose pixels count then.

    Raises:
        MixLoraError: the file is missing, no regular file, not an image, damaged, or larger than [`limits`] say.
    """
    if problem := _problem_of_file(path):
        raise MixLoraError(f"{path}: {problem}")
    return _pixels(path, padded, str(path))


def image_of_bytes(content: bytes, padded: bool, name: str) -> Image.Image:
    """As [`open_image`], of a file's content; errors call it `name`."""
    if len(content) > (most := limits().image_bytes):
        raise MixLoraError(f"{name}: {len(content):,} bytes, more than {most:,}; scale it down")
    return _pixels(io.BytesIO(content), padded, name)


def _pixels(file: str | Path | io.BytesIO, padded: bool, name: str) -> Image.Image:
    try:
        with _opened(file) as image:
            if problem := _problem_of_header(image, padded):
                raise MixLoraError(f"{name}: {problem}")
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except MixLoraError:
        raise
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, ValueError and others for damage
        raise MixLoraError(f"{name}: {_damage(error)}") from error


def image_problem(path: str | Path, check: str = HEADERS, padded: bool = False) -> str | None:
    """What is wrong with an image file, in words that continue its name; None when it can be used.

    Args:
        path: the file.
        check: of [`CHECKS`].
        padded: whether it will be padded to a square (`--image_aspect_ratio pad`), whose pixels count then.
    """
    if check == NONE:
        return None
    if problem := _problem_of_file(path):
        return problem
    try:
        with _opened(path) as image:
            if problem := _problem_of_header(image, padded):
                return problem
            if check == FULL or not _is_whole(image, path):
                image.load()
    except Exception as error:
        return _damage(error)
    return None


def check_images(samples: Iterable[dict], data_path: str | Path, image_folder: str | Path) -> None:
    """Refuse data that names an image which cannot be used.

    Raises:
        MixLoraError: the first of them with what is wrong, and how many there are.
    """
    problems: dict[str, str | None] = {}
    unusable = []
    for position, sample in enumerate(samples):
        for name in images_of(sample):
            if name not in problems:
                problems[name] = image_problem(os.path.join(image_folder, name))
                unusable += [(position, name)] if problems[name] else []
    if unusable:
        position, name = unusable[0]
        raise MixLoraError(
            f"{os.path.join(image_folder, name)}: {problems[name]}, but entry {position} of {data_path} names it "
            f"({len(unusable)} of {len(problems)} images cannot be used); check --image_folder"
        )


def _problem_of_file(path: str | Path) -> str | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "no such image"
    except (OSError, ValueError) as error:  # the latter for names with a NUL character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(status.st_mode):
        return "a folder, not an image" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    if status.st_size > (most := limits().image_bytes):
        return f"a file of {status.st_size:,} bytes, more than {most:,}; scale it down {how_to_raise('image_bytes')}"
    return "an empty file; copy it again" if status.st_size == 0 else None


@contextmanager
def _opened(path: str | Path | io.BytesIO) -> Iterator[Image.Image]:
    """An image whose pixels are not read yet; [`_problem_of_header`] refuses what Pillow would warn of."""
    if Image.MAX_IMAGE_PIXELS is not None and limits().image_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limits().image_pixels  # Pillow refuses twice that by itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def size_problem(width: int, height: int, padded: bool) -> str | None:
    """What is wrong with an image's size in pixels, None when nothing; `padded`: to a square, whose pixels count."""
    short, long = sorted((width, height))
    size = f"{width} x {height} pixels"
    if long > limits().image_ratio * short:
        how = how_to_raise("image_ratio")
        return f"{size}, an aspect ratio above {limits().image_ratio}; cut it, or leave it out {how}"
    if (long * long if padded else long * short) > limits().image_pixels:
        how = ", padded to a square" if padded else ""
        most = f"{limits().image_pixels / 10**6:,.0f} million"
        return f"{size}{how}: more than {most}; scale it down {how_to_raise('image_pixels')}"
    return None


def _problem_of_header(image: Image.Image, padded: bool) -> str | None:
    if problem := size_problem(*image.size, padded):
        return problem
    if image.mode == FLOATING_POINT:
        return "pixels of floating point, whose range is not known; save it with 8 or 16 bits"
    return None


def _is_whole(image: Image.Image, path: str | Path) -> bool:
    """Whether the file's last bytes are those of a whole file of its format; False where that does not tell."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(max(0, size - TAIL))
        tail = file.read()
    if image.format == "PNG":
        return b"IEND\xaeB`\x82" in tail
    if image.format in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if image.format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return image.format == "GIF" and tail.rstrip(b"\0").endswith(b";")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode not in SIXTEEN_BITS:
        return image
    return image.convert("I").point(lambda value: value * (255 / 65535) + 0.5).convert("L")


def _damage(error: Exception) -> str:
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "cannot identify image file" in what:
        return "not an image of a known format, or damaged; copy it again"
    return f"damaged ({what}); copy it again"
