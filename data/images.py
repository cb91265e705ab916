"""Reads image files of every mode and format as RGB, and skips damaged ones."""

import errno
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, log


class DamagedImage(Exception):
    """An image file cannot be read; the message is the reason."""


def read(path: bytes, reduction: int = 1) -> Image.Image:
    """Read an image file as RGB, without its transparency and without applying EXIF's orientation.

    Args:
        reduction: 1, 2, 4 or 8; a JPEG file is decoded with its sides divided by it, rounded up.

    Raises:
        DamagedImage: the file is missing, cut off, no image, or has more pixels than Pillow's limit.
        OSError, MemoryError: this process has too many open files, or too little memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on metadata and on size, which is checked; damaged pixels raise an error
        return _read(path, reduction)


def _read(path: bytes, reduction: int = 1) -> Image.Image:
    """`read`, with Pillow's warnings: warnings.catch_warnings must not run in several threads at once."""
    try:
        with Image.open(path) as image:
            image.draft(None, (image.width // reduction, image.height // reduction))
            limit = Image.MAX_IMAGE_PIXELS  # None if the user of this module has none
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {limit:,}")
            if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip rather than scale
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # a damaged image can raise anything
        raise _damage(error) from error


def read_small(paths: np.ndarray, largest: int, workers: int) -> tuple[np.ndarray, dict[int, str]] | None:
    """Decode image files of a single size; None if sizes differ, or if a side is longer than `largest`.

    A thread holds the GIL for half of the 90 us that a CIFAR image takes, so a third thread gains nothing; processes
    would have to start, and to send the pixels.

    Returns:
        (n, H, W, 3) uint8, and {index: reason} of the files that cannot be read.
    """
    size = _first_size(paths)
    if max(size) > largest:
        return None
    log.info(f"decoding {len(paths):,} images")
    images = np.empty((len(paths), *size[::-1], 3), np.uint8)
    damaged: dict[int, str] = {}

    def decode(chunk: range) -> bool:
        for index in chunk:
            try:
                image = _read(paths[index])
            except DamagedImage as error:
                damaged[index] = str(error)
                continue
            if image.size != size:
                return False
            images[index] = image
        return True

    chunks = [range(start, min(start + 256, len(paths))) for start in range(0, len(paths), 256)]
    with (
        tqdm(desc="decoding", total=len(paths), unit=" images", leave=False, disable=None) as bar,
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers) as pool,
    ):
        warnings.simplefilter("ignore")  # as in `read`
        for chunk, alike in zip(chunks, decoded := pool.map(decode, chunks), strict=True):
            if not alike:
                decoded.close()  # cancels the chunks that have not begun
                return None
            bar.update(len(chunk))
    return images, dict(sorted(damaged.items()))


def _first_size(paths: np.ndarray) -> tuple[int, int]:
    """(width, height) of the first image that can be read."""
    for path in paths:
        try:
            return read(path).size
        except DamagedImage:
            continue
    return 1, 1


def _damage(error: Exception) -> DamagedImage:
    """The error as a DamagedImage; raises it again if the machine caused it rather than the file."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return DamagedImage("no image")
    return DamagedImage(getattr(error, "strerror", None) or str(error) or type(error).__name__)


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
                f"the first is {path} ({reason}): repair or delete them"
            )
        for path, reason in new.items():
            log.info(f"skipping {path}, which cannot be read: {reason}")
