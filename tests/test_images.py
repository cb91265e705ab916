"""Image files of every mode, and errors that are not theirs."""

import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import DamagedImage, OtherSize, decode, extensions, read, usual_size
from data.sources import Preprocessing
from experiment import classify
from tests.helpers import ROOT, open_files_used_up

AS_IT_IS = asdict(Preprocessing((40, 50), (40, 50)))


def gray(width=50, height=40):
    return np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)


def color(width=50, height=40, channels=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), np.uint8)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: to be turned by 90 degrees


def on_white(pixels):
    """(H, W, C) with an opacity as the last channel -> (H, W, C - 1) in front of white."""
    opacity = pixels[..., -1:] / 255
    return opacity * pixels[..., :-1] + (1 - opacity) * 255


def gray16_with_a_transparent_value(path):
    Image.fromarray(gray().astype(np.uint16) * 257).save(path, transparency=257 * 7)
    return np.repeat(np.where(gray() == 7, 255, gray())[..., None], 3, -1)


def rgb_with_a_transparent_color(path):
    pixels = color()
    pixels[:20] = (1, 2, 3)
    Image.fromarray(pixels).save(path, transparency=(1, 2, 3))
    return np.where((pixels == (1, 2, 3)).all(-1, keepdims=True), 255, pixels)


def palette_with_transparency(path):
    """256 colors, each with an opacity of its own."""
    colors = color(256, 1)[0]
    image = Image.frombytes("P", (50, 40), gray().tobytes())
    image.putpalette(colors.tobytes())
    image.save(path, transparency=bytes(range(256)))
    return on_white(np.concatenate([colors, np.arange(256, dtype=np.uint8)[:, None]], 1)[gray()])


def cmyk(path):
    Image.frombytes("CMYK", (50, 40), color(channels=4).tobytes()).save(path)
    stored = np.asarray(Image.open(path)).astype(int)  # what JPEG made of it
    return (255 - stored[..., :3]) * (255 - stored[..., 3:]) / 255


def saved(image, pixels, **options):
    """A writer of the image to a path, which returns what is to be read from there."""

    def write(path):
        image.save(path, **options)
        return np.broadcast_to(pixels if pixels.ndim == 3 else pixels[..., None], (40, 50, 3))

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rgb.png", saved(Image.fromarray(color()), color())),
        ("gray.png", saved(Image.fromarray(gray()), gray())),
        ("gray.tif", saved(Image.fromarray(gray().astype(np.uint16) * 257), gray())),
        ("gray16.png", saved(Image.fromarray(gray().astype(np.uint16) * 257), gray())),
        ("gray16_with_a_transparent_value.png", gray16_with_a_transparent_value),
        ("gray32.tif", saved(Image.fromarray(gray().astype(np.int32) * 257), gray())),
        ("gray32_of_8_bits.tif", saved(Image.fromarray(gray().astype(np.int32)), gray())),
        ("rgba.png", saved(Image.fromarray(color(channels=4)), on_white(color(channels=4)))),
        ("gray_alpha.png", saved(Image.fromarray(color(channels=2)), on_white(color(channels=2)))),
        ("rgb_with_a_transparent_color.png", rgb_with_a_transparent_color),
        ("palette.png", palette_with_transparency),
        ("bilevel.png", saved(Image.fromarray(gray() > 127), (gray() > 127) * 255)),
        ("cmyk.jpg", cmyk),
        ("turned.png", saved(Image.fromarray(color()), color(), exif=TURNED)),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, recwarn, name, write):
    expected = write(tmp_path / name)
    image = read(str(tmp_path / name).encode())
    assert image.mode == "RGB"
    rounded = name == "cmyk.jpg" or "alpha" in name or name in ("rgba.png", "palette.png")
    np.testing.assert_allclose(np.asarray(image), expected, atol=1 if rounded else 0)
    assert np.array_equal(image, classify.read(tmp_path / name, AS_IT_IS))
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (gray().astype(np.float32), "floating-point"),
        (gray().astype(np.int32) - 1, "from -1 to 254"),
        (gray().astype(np.int32) * 258, "from 0 to 65790"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DamagedImage, match=message):
        read(str(tmp_path / "a.tif").encode())
    with pytest.raises(ValueError, match="its pixels are"):
        classify.read(tmp_path / "a.tif", AS_IT_IS)


@pytest.mark.parametrize("limit", [39 * 48, 480, 30])  # also of half of the pixels, which Pillow itself refuses
def test_a_jpeg_file_of_too_many_pixels_is_decoded_at_a_smaller_scale(tmp_path, monkeypatch, limit):
    path = tmp_path / "a.jpg"
    Image.fromarray(color(3, 2)).resize((48, 40)).save(path, quality=95)
    whole = read(str(path).encode())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    image = read(str(path).encode())
    assert image.width * image.height <= limit <= 4 * image.width * image.height
    np.testing.assert_allclose(image, whole.resize(image.size, Image.Resampling.BOX), atol=12)
    assert np.array_equal(image, classify.read(path, AS_IT_IS))


def test_extensions_are_those_that_pillow_reads_as_images():
    assert {".jpg", ".jfif", ".jpe", ".png", ".gif", ".tga", ".webp", ".tif", ".avif", ".mpo"} <= extensions()
    assert extensions().isdisjoint({".txt", ".pdf", ".mpg", ".eps", ".h5", ".heic", ""})


def test_the_usual_size_is_that_of_most_images(tmp_path):
    paths = []
    for i, size in enumerate([(500, 300), (20, 30), (20, 30)]):
        paths.append(str(tmp_path / f"{i}.png").encode())
        Image.new("RGB", size).save(paths[-1])
    assert usual_size(np.array([b"none", *paths])) == (20, 30)
    with pytest.raises(OtherSize, match=r"0\.png has 500 x 300 pixels, others have 20 x 30"):
        decode(np.array(paths), (20, 30), workers=2)


def bomb(path, side=20_000):
    """Write a PNG of side x side pixels, in a few bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the first and refuses the second
def test_images_of_too_many_pixels_are_refused_without_a_warning(tmp_path, recwarn, side):
    bomb(tmp_path / "bomb.png", side)
    Image.fromarray(gray()).save(tmp_path / "small.png")
    paths = np.array([str(tmp_path / name).encode() for name in ("small.png", "bomb.png")])
    filters = list(warnings.filters)
    with pytest.raises(DamagedImage, match="pixels"):
        read(paths[1])
    _, damaged = decode(paths, (50, 40), workers=2)
    assert list(damaged) == [1]
    assert warnings.filters == filters
    assert not list(recwarn)


def test_an_image_that_this_process_cannot_open_is_not_damaged(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(color()).save(path)
    path = str(path).encode()
    for attempt in (lambda: read(path), lambda: decode(np.array([path]), (50, 40), workers=1)):
        with open_files_used_up(), pytest.raises(OSError, match="Too many open files"):
            attempt()
    with pytest.raises(DamagedImage, match="No such file"):
        read(path + b"missing")


LIMITED = """
import resource, sys
from pathlib import Path
from data.images import read

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
try:
    read(sys.argv[1].encode())
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory by what /proc says is used")
def test_lack_of_memory_is_no_damage(tmp_path):
    """In a process of its own: this one may have enough freed memory."""
    path = tmp_path / "large.png"
    Image.new("RGB", (8000, 8000)).save(path)  # 192 MB
    command = [sys.executable, "-c", LIMITED, str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "MemoryError\n"
