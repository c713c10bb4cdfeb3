"""Image files: whether one can be used, told from its headers and its end, and its pixels as viewers show them."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from ..errors import MixLoraError

HEADERS, FULL, NONE = CHECKS = ("headers", "full", "none")
"""How far images are checked: headers and ends, every pixel (slow), or not at all."""
MAX_ASPECT_RATIO = 200
"""Longer side to shorter side. Cropping a square scales the shorter side to the tower's size, so that a picture of
1 x 20,000 pixels would take 20,000 x 336 x 336 of them."""
MAX_PIXELS = 2 * (1024**3 // 4 // 3)
"""What Pillow takes for an attack: 179 million pixels. Padding to a square counts the square's."""
FLOATING_POINT = "F"
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
TAIL = 1 << 16  # bytes in which a JPEG's end is looked for: cameras append thumbnails and notes


def open_image(path: str | Path) -> Image.Image:
    """The image as RGB of 8 bits, turned as its EXIF orientation says; 16 bits of gray are scaled, not clipped.

    Raises:
        MixLoraError: the file is missing, no regular file, not an image, or damaged.
    """
    if problem := _problem_of_file(path):
        raise MixLoraError(f"{path}: {problem}")
    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, ValueError and others for damage
        raise MixLoraError(f"{path}: {_damage(error)}") from error


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused above twice that size
            with Image.open(path) as image:
                if problem := _problem_of_size(image, padded):
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
        name = sample.get("image")
        if name is not None and name not in problems:
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
    return "an empty file; copy it again" if status.st_size == 0 else None


def _problem_of_size(image: Image.Image, padded: bool) -> str | None:
    short, long = sorted(image.size)
    size = f"{image.width} x {image.height} pixels"
    if long > MAX_ASPECT_RATIO * short:
        return f"{size}, an aspect ratio above {MAX_ASPECT_RATIO}; cut it, or leave it out"
    if (long * long if padded else long * short) > MAX_PIXELS:
        how = ", padded to a square" if padded else ""
        return f"{size}{how}: more than {MAX_PIXELS // 10**6} million; scale it down"
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
