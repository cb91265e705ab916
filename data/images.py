"""Image files: every mode and format as RGB, and what becomes of those that cannot be read."""

import errno
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import distributed
from utils.errors import UserError, log

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about metadata; damaged pixels are errors


class DamagedImage(Exception):
    """Why an image file cannot be read."""


def read(path: bytes) -> Image.Image:
    """The image as RGB; transparency is dropped, and the orientation that EXIF data may state is not applied.

    Raises:
        DamagedImage: the file is missing, cut off, no image, or suspiciously large.
        OSError, MemoryError: this process has too many open files, or too little memory.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip rather than scale
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
            if image.mode == "P":  # Pillow complains of a palette's transparency unless it sees it go
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # a damaged image can raise anything
        raise _damage(error) from error


def read_size(path: bytes) -> tuple[int, int]:
    """(width, height), from the header alone; raises as `read` does."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _damage(error) from error


def _damage(error: Exception) -> DamagedImage:
    """Why an image cannot be read; raises the error again where it says nothing about the file."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, UnidentifiedImageError):
        return DamagedImage("no image")
    return DamagedImage(getattr(error, "strerror", None) or str(error) or type(error).__name__)


class SkippedImages:
    """The damaged images of a data set that have been met so far: a few are left out, many stop the run.

    Args:
        total: images of the data set, all splits together.

    Attributes:
        reasons: why each cannot be read, by its path as text.
    """

    TOLERATED = 0.01

    def __init__(self, total: int = 0):
        self.total = total
        self.reasons: dict[str, str] = {}

    def add(self, found: Mapping[bytes, str]) -> None:
        """Leave out these images; logs the path of each that is new.

        Raises:
            UserError: they are more than TOLERATED of the data set.
        """
        self._add({path.decode(errors="backslashreplace"): reason for path, reason in found.items()})

    def share(self) -> None:
        """Add what the other processes have met, all of which must call this; raises as `add` does."""
        for reasons in distributed.gathered(self.reasons):
            self._add(reasons)

    def _add(self, found: Mapping[str, str]) -> None:
        new = {path: reason for path, reason in found.items() if path not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > self.TOLERATED * self.total:
            path, reason = next(iter(self.reasons.items()))
            raise UserError(
                f"{len(self.reasons)} of the {self.total:,} images cannot be read, more than {self.TOLERATED:.0%}; "
                f"the first is {path} ({reason}): repair or delete them"
            )
        for path, reason in new.items():
            log.info(f"skipping {path}, which cannot be read: {reason}")
