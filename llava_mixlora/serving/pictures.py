"""Pictures of a request: data in it, or files of a folder that is allowed. No address is ever fetched."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from PIL import Image

from ..data.images import image_of_bytes, open_image
from ..errors import MixLoraError
from ..limits import limits
from .request_error import RequestError

DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
FOLDER_FLAG = "--allowed-image-folder"


def read_picture(url: str, name: str, folder: Path | None, padded: bool) -> Image.Image:
    """The picture as RGB of 8 bits.

    Args:
        url: `data:image/...;base64,...`, or `file:` and a path in `folder`.
        name: what errors call it.
        folder: where files may lie; None where none are read.
        padded: whether it will be padded to a square, whose pixels count then.

    Raises:
        RequestError: it is another address, outside of the folder, too large, or no picture.
    """
    try:
        if url.startswith("data:"):
            return image_of_bytes(_data(url, name), padded, name)
        if url.startswith("file:"):
            return open_image(_file(url, folder), padded)
        raise MixLoraError(
            f"{name} is at {url[:60]!r}, and nothing is fetched here; expected data:image/TYPE;base64,DATA"
        )
    except MixLoraError as error:
        raise RequestError(str(error), "messages") from None


def _data(url: str, name: str) -> bytes:
    head = DATA.match(url[:256])
    if head is None:
        raise MixLoraError(f"{name} begins with {url[:40]!r}; expected data:image/TYPE;base64,DATA")
    if len(url) - head.end() > (limits().image_bytes + 2) // 3 * 4:
        raise MixLoraError(f"{name} has more than {limits().image_bytes:,} bytes; scale it down")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise MixLoraError(f"{name} is no base64 data ({error})") from None


def _file(url: str, folder: Path | None) -> Path:
    """The file that a name leads to; one message for all that are not given, so that none tells what there is."""
    if folder is None:
        raise MixLoraError(f"{url[:60]!r}: no files are read here; the server may allow a folder ({FOLDER_FLAG} DIR)")
    parsed = urlparse(url)
    refusal = MixLoraError(f"{url[:120]!r}: no such image in the folder that is allowed")
    if parsed.netloc not in ("", "localhost"):
        raise refusal
    try:
        file = (folder / unquote(parsed.path)).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise refusal from None
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise refusal
    return file
