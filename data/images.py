"""Reads image files of every mode and format as RGB, and skips damaged ones."""

import errno
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, log

# Formats of Pillow that hold data, videos or programs rather than an image.
NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


class DamagedImage(Exception):
    """An image file cannot be read; the message is the reason."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings on metadata and on size, which is checked. Several threads must not enter it at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@without_warnings()
def read(path: bytes, reduction: int = 1) -> Image.Image:
    """Read an image file as RGB: transparency on white, 16-bit gray scaled to 8 bits, EXIF's orientation not applied.

    Args:
        reduction: 1, 2, 4 or 8; a JPEG file is decoded with its sides divided by it, rounded up.

    Raises:
        DamagedImage: the file is missing, cut off, no image, or not of integers, or has more pixels than the limit.
        OSError, MemoryError: this process has too many open files, or too little memory.
    """
    try:
        with open_image(path) as image:
            needed = reduction_below_limit(image)
            if needed > 1 and not isinstance(image, JpegImageFile):
                raise ValueError(f"{image.width} x {image.height} pixels are more than Pillow's limit: scale it down")
            factor = max(needed, reduction)
            image.draft(None, (image.width // factor, image.height // factor))
            return to_rgb(image)
    except Exception as error:  # a damaged image can raise anything
        of_the_machine = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in of_the_machine:
            raise
        known = "no image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        raise DamagedImage(known or str(error) or type(error).__name__) from error


def open_image(path: bytes) -> Image.Image:
    """As Image.open, also for JPEG files of more than twice Pillow's limit of pixels."""
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        try:
            return JpegImageFile(path)
        except SyntaxError:  # no JPEG file
            raise ValueError(f"{error}: scale it down") from error


def reduction_below_limit(image: Image.Image) -> int:
    """The factor of 1, 2, 4 or 8 by which the sides are to be divided for no more pixels than Pillow's limit."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height  # no limit if the user of this module has none
    return next((factor for factor in (1, 2, 4) if not limit or pixels <= limit * factor**2), 8)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode as RGB.

    Raises:
        ValueError: its pixels are floating-point numbers or beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray, or integers of 32 bits, which Pillow would clip rather than scale
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ValueError(f"its pixels are from {low} to {high}, not of 8 or 16 bits: convert it")
        gray = values // (1 if image.mode == "I" and high <= 255 else 257)
        gray[values == image.info.get("transparency", -1)] = 255  # on white
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@cache
def extensions() -> frozenset[str]:
    """File name extensions of the images that Pillow reads, in lower case."""
    Image.preinit()  # else the usual formats would be tried last: 5 us more an image
    suffixes, known = Image.registered_extensions(), Image.OPEN.keys() - NO_IMAGES
    return frozenset({".mpo", *(suffix for suffix, name in suffixes.items() if name in known)})


class OtherSize(Exception):
    """Images are of more than one size; the message names two that differ."""


@without_warnings()
def usual_size(paths: np.ndarray) -> tuple[int, int]:
    """The most frequent (width, height) of image files, from their headers; (1, 1) if none can be read."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in paths:
        with suppress(Exception), open_image(path) as image:  # `read` finds the reason
            sizes[image.size] += 1
    return sizes.most_common(1)[0][0] if sizes else (1, 1)


def decode(paths: np.ndarray, size: tuple[int, int], workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """Decode image files of one size, (width, height).

    A thread holds the GIL for half of the 90 us that a CIFAR image takes, so a third thread gains nothing; processes
    would have to start, and to send the pixels.

    Returns:
        (n, H, W, 3) uint8, and {index: reason} of the files that cannot be read.

    Raises:
        OtherSize: an image has another size.
    """
    log.info(f"decoding {len(paths):,} images")
    images = np.empty((len(paths), *size[::-1], 3), np.uint8)
    damaged: dict[int, str] = {}

    def decode_chunk(chunk: range) -> None:
        for index in chunk:
            try:
                image = read.__wrapped__(paths[index])  # `without_warnings` surrounds all threads
            except DamagedImage as error:
                damaged[index] = str(error)
                continue
            if image.size != size:
                path, (width, height) = paths[index].decode(errors="backslashreplace"), image.size
                raise OtherSize(f"{path} has {width} x {height} pixels, others have {size[0]} x {size[1]}")
            images[index] = image

    chunks = [range(start, min(start + 256, len(paths))) for start in range(0, len(paths), 256)]
    with (
        tqdm(desc="decoding", total=len(paths), unit=" images", leave=False, disable=None) as bar,
        without_warnings(),
        ThreadPoolExecutor(workers) as pool,
    ):
        decoded = pool.map(decode_chunk, chunks)  # cancels the chunks that have not begun once one raises an error
        for chunk, _ in zip(chunks, decoded, strict=True):
            bar.update(len(chunk))
    return images, dict(sorted(damaged.items()))


class SkippedImages:
    """The damaged images found in a data set so far: a few are skipped, many stop the run.

    Args:
        total: number of images in all splits.

    Attributes:
        reasons: why an image cannot be read, by its path as text.
    """

    TOLERATED = 0.01

    def __init__(self, total: int = 0):
        self.total = total
        self.reasons: dict[str, str] = {}

    def share(self) -> None:
        """Add the images that other processes skipped; all of them must call this. Raises as `add` does."""
        for reasons in distributed.gathered(self.reasons):
            self.add({path.encode(): reason for path, reason in reasons.items()})

    def add(self, found: Mapping[bytes, str]) -> None:
        """Skip images, by path with the reason, and log each new one.

        Raises:
            UserError: more than TOLERATED of the data set is skipped.
        """
        texts = {path.decode(errors="backslashreplace"): reason for path, reason in found.items()}
        new = {path: reason for path, reason in texts.items() if path not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > self.TOLERATED * self.total:
            path, reason = next(iter(self.reasons.items()))
            raise UserError(
                f"{len(self.reasons)} of the {self.total:,} images cannot be read, more than {self.TOLERATED:.0%}; "
                f"the first is {path} ({reason}): repair them or move them elsewhere"
            )
        for path, reason in new.items():
            log.info(f"skipping {path}, which cannot be read: {reason}")
