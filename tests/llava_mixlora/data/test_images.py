"""Image files are opened as viewers show them, and what is wrong with one is told from its headers and its end."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_mixlora.data.images import check_images, image_problem, open_image
from llava_mixlora.limits import VARIABLE, limits

from ...tiny import message_of

pytestmark = pytest.mark.one_stack

FORMATS = {"png": "RGB", "jpg": "RGB", "webp": "RGB", "gif": "P", "bmp": "RGB", "tiff": "RGB"}


@pytest.fixture
def noise():
    """Pixels [32, 48, 3] that do not compress away."""
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def written(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("check", ["headers", "full"])
@pytest.mark.parametrize("ending, mode", FORMATS.items())
def test_whole_images_pass(tmp_path, noise, ending, mode, check):
    file = written(tmp_path, f"1.{ending}", Image.fromarray(noise).convert(mode))
    assert image_problem(file, check) is None and open_image(file).size == (48, 32)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("ending, mode", FORMATS.items())
def test_truncated_images_are_found_by_their_ends(tmp_path, noise, ending, mode, share):
    file = written(tmp_path, f"1.{ending}", Image.fromarray(noise).convert(mode))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert image_problem(file) is not None
    assert str(file) in message_of(open_image, file) and "copy it again" in message_of(open_image, file)


def test_what_cameras_append_is_no_damage(tmp_path, noise):
    file = written(tmp_path, "1.jpg", Image.fromarray(noise))
    file.write_bytes(file.read_bytes() + b"\0" * 2000)
    assert image_problem(file) is None


def test_damage_inside_is_found_by_decoding_alone(tmp_path, noise):
    file = written(tmp_path, "1.png", Image.fromarray(noise))
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\0" * 40
    file.write_bytes(content)
    assert image_problem(file) is None and "damaged" in image_problem(file, "full")
    assert "damaged" in message_of(open_image, file)
    assert image_problem(file, "none") is None


def test_what_is_no_image_file_is_told(tmp_path):
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert "not an image" in image_problem(tmp_path / "text.png")
    assert "empty file" in image_problem(tmp_path / "empty.png")
    assert "not a regular file" in image_problem(tmp_path / "pipe.png")  # opening it would wait for ever
    assert "a folder" in image_problem(tmp_path)
    assert "no such image" in image_problem(tmp_path / "gone.png")
    assert "cannot be read" in image_problem(f"{tmp_path}/a\0b.png")
    assert "no such image" in image_problem(tmp_path / "gone.png", "headers")


def test_long_thin_images_are_refused(tmp_path):
    for size, problem in (((limits().image_ratio, 1), None), ((1, limits().image_ratio + 1), "aspect ratio above")):
        found = image_problem(written(tmp_path, "1.png", Image.new("RGB", size)))
        assert found is None if problem is None else problem in found


def test_what_is_refused_is_not_opened_either(tmp_path, monkeypatch):
    thin = written(tmp_path, "1.png", Image.new("RGB", (1, limits().image_ratio + 1)))
    assert "aspect ratio above" in message_of(open_image, thin)
    square = written(tmp_path, "2.png", Image.new("RGB", (20, 10)))
    monkeypatch.setenv(VARIABLE, "image_pixels=200")
    assert open_image(square).size == (20, 10)
    assert "padded to a square" in message_of(open_image, square, padded=True)
    monkeypatch.setenv(VARIABLE, "image_bytes=10")
    assert "bytes, more than 10" in message_of(open_image, square) and "more than 10" in image_problem(square)


def test_limits_can_be_raised(tmp_path, monkeypatch):
    thin = written(tmp_path, "1.png", Image.new("RGB", (1, limits().image_ratio + 1)))
    monkeypatch.setenv(VARIABLE, f"image_ratio={limits().image_ratio + 1}")
    assert image_problem(thin) is None and open_image(thin).size[0] == 1


def test_images_of_too_many_pixels_are_refused_without_decoding_them(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for width, height, padded, refused in (
        (20_000, 20_000, False, True),
        (20_000, 2_000, False, False),
        (20_000, 2_000, True, True),
    ):
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        content = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        problem = image_problem(tmp_path / "1.png", padded=padded)
        assert (problem is not None) == refused
        assert not refused or "million" in problem or "exceeds limit" in problem


def test_gray_of_sixteen_bits_is_scaled(tmp_path):
    gray = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    file = written(tmp_path, "1.png", Image.fromarray(gray))
    assert np.asarray(open_image(file))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_is_refused(tmp_path):
    file = written(tmp_path, "1.tiff", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    assert "floating point" in image_problem(file)


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (2, 1)), (6, (1, 0)), (8, (0, 2))])
def test_images_are_turned_as_viewers_do(tmp_path, orientation, corner):
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = written(tmp_path, "1.png", image, exif=exif)
    turned = open_image(file)
    assert turned.size == ((3, 2) if orientation in (1, 3) else (2, 3))
    assert turned.getpixel(corner) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    ending = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    image = Image.new(mode, (4, 4)) if mode == "I;16" else Image.new("RGB", (4, 4), "red").convert(mode)
    file = written(tmp_path, f"1.{ending}", image)
    assert image_problem(file) is None and open_image(file).mode == "RGB"


def test_first_unusable_image_is_named_with_its_entry_and_their_number(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    names = ["1.png", "gone/b.png", "gone/a.png", "gone/b.png"]
    samples = [{"image": name} for name in names]
    message = message_of(check_images, samples, "data.json", tmp_path)
    assert f"{tmp_path}/gone/b.png: no such image" in message
    assert "entry 1 of data.json" in message and "(2 of 3 images cannot be used)" in message


def test_samples_without_images_need_none():
    check_images([{"conversations": []}], "data.json", "/no/such/folder")
