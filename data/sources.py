"""The types DataSet and Split, the digits that ship with the project, and functions that all sources share."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from data.images import SkippedImages
from utils.errors import UserError


@dataclass(frozen=True)
class Fingerprint:
    """The number of a split's images, and a hash of their pixels (or paths) and targets."""

    count: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Images of one use.

    Attributes:
        images: (n, H, W, 3) uint8, or for images that stream (n,) paths as bytes.
        targets: (n,) int64 class indices.
    """

    images: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, indices: np.ndarray | slice) -> "Split":
        return Split(self.images[indices], self.targets[indices])

    def fingerprint(self, data_dir: Path | None) -> Fingerprint:
        """Hash the targets and pixels or, for images that stream, the targets and the paths below `data_dir`."""
        digest = hashlib.sha256(np.ascontiguousarray(self.targets))
        if self.images.ndim == 1:
            root = os.fsencode(data_dir.resolve()) + b"/"
            digest.update(b"\0".join(path.removeprefix(root) for path in self.images.tolist()))
        else:
            digest.update(str(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images))
        return Fingerprint(len(self), digest.hexdigest())


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the pixels that a network is evaluated on. Sizes are (height, width).

    The RGB image is scaled, with its aspect ratio, until it just covers `resize`. Then its center is cropped to `crop`,
    with black around a smaller image. An image of size `crop` that covers `resize` stays as it is.

    Attributes:
        interpolation, antialias: arguments of torchvision's Resize.
        decoder: "pillow" stands for `data.images.read`. "torchvision" has the same pixels, but JPEG files whose sides
            are at least 2, 4 or 8 times those of `resize` are divided by that factor while they are decoded.
        filter: the program that scales; pixels of "pillow" and "torchvision" differ by at most 1.
        background: color behind transparent pixels; files of older versions, which dropped transparency, lack it.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    interpolation: str = "bilinear"
    antialias: bool = True
    decoder: str = "pillow"
    filter: str = "pillow"
    background: str = "white"


@dataclass(frozen=True)
class DataSet:
    """A data set, before or after `data.load` splits a validation set from it.

    Attributes:
        val: validation images; with val_size 0, it is `test`. None before the split, unless the data set has its own.
        mean, std: per channel, of pixels in 0 .. 1.
        padding: zero padding in pixels before the random crop of images in memory.
        border: black pixels that were added on each side of images in memory.
        flip: whether an image and its mirror image are of the same class.
        image_size: height and width to which streamed images are cropped; None if the images are in memory.
        skipped: damaged images, which are left out.
        remarks: notes on the files, for the log and the report.
        places: for messages: where the files of "train", "test" and "val" are listed.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    val: Split | None = None
    image_size: int | None = None
    border: int = 0
    skipped: SkippedImages = field(default_factory=SkippedImages)
    remarks: Sequence[str] = ()
    places: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = " / ".join(f"{len(split):,}" for split in (self.train, self.val, self.test))
        size = " x ".join(map(str, self.input_size))
        return f"{self.name}: {len(self.classes)} classes, {counts} training / validation / test images of {size}"

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        if self.image_size:
            return 3, self.image_size, self.image_size
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name, without the validation set if it is the test set."""
        val = {} if self.val is self.test else {"validation": self.val}
        return {"training": self.train, **val, "test": self.test}

    @cached_property
    def repeated(self) -> dict[str, int]:
        """Number of training images that are in another split, too, by its name; empty for images that stream."""
        if self.image_size:
            return {}
        hashes = {
            name: [hashlib.sha256(image.tobytes()).digest() for image in split.images]
            for name, split in self.splits.items()
        }
        training = hashes.pop("training")
        return {name: sum(map(set(known).__contains__, training)) for name, known in hashes.items()}

    def notes(self) -> list[str]:
        """Remarks on the files, and a note for each split that shares images with the training set."""
        return [*self.remarks] + [
            f"{count:,} of {len(self.train):,} training images are pixel by pixel in the {name} set, too: accuracies "
            "there are in part on images that were trained on."
            for name, count in self.repeated.items()
            if count
        ]

    def doubts(self) -> list[str]:
        """`notes`, and those on images that cannot be read and classes without an image in a split."""
        notes, reasons = self.notes(), self.skipped.reasons
        if reasons:
            path, reason = min(reasons.items())
            count = f"{len(reasons):,} of {self.skipped.total:,} images"
            notes.append(f"Left out because they cannot be read: {count}, such as {path} ({reason}).")
        for name, split in self.splits.items():
            if missing := [self.classes[i] for i in np.setdiff1d(range(len(self.classes)), split.targets)]:
                listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
                notes.append(f"No {name} image is of these classes, so there is no accuracy for them: {listed}.")
        return notes

    @property
    def preprocessing(self) -> Preprocessing:
        """Streamed images are cropped to their center, 224 of 256 pixels, as in ImageNet's usual recipe."""
        _, *crop = self.input_size
        resize = (round(side * 256 / 224) if self.image_size else side - 2 * self.border for side in crop)
        program = "torchvision" if self.image_size else "pillow"
        return Preprocessing(resize=tuple(resize), crop=tuple(crop), decoder=program, filter=program)

    def normalized_as(
        self, mean: Sequence[float], std: Sequence[float], classes: Sequence[str], source: Path
    ) -> "DataSet":
        """The data set with the normalization of the network in `source`; UserError if its classes are others."""
        if difference := first_difference(classes, self.classes):
            raise UserError(
                f"{source} knows other classes than {self.name} has ({difference}): give the data it was trained on"
            )
        return replace(self, mean=tuple(mean), std=tuple(std))

    def fingerprints(self, data_dir: Path | None) -> dict[str, Fingerprint]:
        """The fingerprint of each split, by its name."""
        return {name: getattr(self, name).fingerprint(data_dir) for name in ("train", "val", "test")}

    @property
    def meta(self) -> dict[str, Any]:
        """The fields of `utils.checkpoint.Meta` that describe the data, as plain values."""
        return {
            "num_classes": len(self.classes),
            "classes": self.classes,
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "preprocessing": asdict(self.preprocessing),
        }


def digits() -> DataSet:
    """The 1,797 handwritten digits of data/DIGITS.md, 8 x 8; a fixed fifth of them is the test set."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        gray, targets = file["images"], file["targets"].astype(np.int64)
    images = Split(np.repeat(np.round(gray * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1), targets)
    test, train = (images[chosen] for chosen in stratified_split(targets, 360))
    mean, std = channel_statistics(train.images)
    return DataSet("digits", list("0123456789"), train, test, mean, std, padding=1, flip=False)


def first_difference(known: Sequence[str], given: Sequence[str]) -> str | None:
    """For messages: the first index at which the classes of a network and those of the data differ."""
    for i, names in enumerate(zip_longest(known, given)):
        if names[0] != names[1]:
            there, here = ("none" if name is None else f"'{name}'" for name in names)
            return f"class {i} is {there} there and {here} in the data"
    return None


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel of (n, H, W, 3) uint8 images, in 0 .. 1. The std is at least 1/255."""
    # Over images first: numpy adds long rows of pixels much faster than rows of 3.
    total, count = images.sum(0, dtype=np.int64).sum((0, 1)), images[..., 0].size
    squares = np.einsum("nhwc,nhwc->hwc", images, images, dtype=np.int64).sum((0, 1))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1))
    return tuple((mean / 255).round(4).tolist()), tuple((std / 255).round(4).tolist())


def stratified_split(targets: np.ndarray, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` images, stratified by class. Returns the sorted indices of these and of the other images."""
    order = np.random.default_rng(seed).permutation(len(targets))
    share = np.empty(len(targets))
    for label in np.unique(targets):
        members = order[targets[order] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    drawn = order[np.argsort(share[order], kind="stable")]
    return np.sort(drawn[:size]), np.sort(drawn[size:])
