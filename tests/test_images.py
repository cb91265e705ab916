"""Image files of every mode, and errors that are not theirs."""

import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import DamagedImage, read, read_small
from tests.helpers import ROOT, open_files_used_up


def gray(width=50, height=40):
    return np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)


def color(width=50, height=40, channels=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), np.uint8)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: to be turned by 90 degrees


def palette_with_transparency(path):
    """256 colors, each with an opacity of its own."""
    colors = color(256, 1)[0]
    image = Image.fromarray(gray(), "P")
    image.putpalette(colors.tobytes())
    image.save(path, transparency=bytes(range(256)))
    return colors[gray()]


def cmyk(path):
    Image.fromarray(color(channels=4), "CMYK").save(path)
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
        ("rgba.png", saved(Image.fromarray(color(channels=4)), color(channels=4)[..., :3])),
        ("gray_alpha.png", saved(Image.fromarray(color(channels=2)), color(channels=2)[..., 0])),
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
    np.testing.assert_allclose(np.asarray(image), expected, atol=1 if name == "cmyk.jpg" else 0)
    assert not list(recwarn)


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
    _, damaged = read_small(paths, 64, workers=2)
    assert list(damaged) == [1]
    assert warnings.filters == filters
    assert not list(recwarn)


def test_an_image_that_this_process_cannot_open_is_not_damaged(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(color()).save(path)
    path = str(path).encode()
    for attempt in (lambda: read(path), lambda: read_small(np.array([path]), 64, workers=1)):
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
