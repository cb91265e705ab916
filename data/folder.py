"""Folders of image files with their classes, from a tree or a CSV file: small images go to memory, others stream."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.files import classified_files, labeled_files
from data.images import DamagedImage, OtherSize, decode, read, usual_size
from data.sources import DataSet, Split, channel_statistics
from utils.errors import UserError

LARGEST = 64  # pixels on each side of images that are kept in memory
IMAGE_SIZE = 224  # default height and width of streamed images
COMPARED = 16  # images of which sizes and pixels are compared before they stream


def folder(data_dir: Path, workers: int, image_size: int | None = None, labels: Path | None = None) -> DataSet:
    """Load the images under data_dir. With both test/ and val/, val/ is the validation set.

    Images of a single size of at most LARGEST x LARGEST are kept in memory unless image_size is given.

    Args:
        labels: a CSV file with the classes of the images, see `labeled_files`. Default: they are in class folders.

    Raises:
        UserError: as `classified_files` and `labeled_files`, or too many images cannot be read.
    """
    root = data_dir.resolve()
    dataset = labeled_files(root, labels) if labels else classified_files("folder", root, ("train", "test", "val"))
    if image_size:
        return streamed(dataset, image_size)
    splits = {use: getattr(dataset, use) for use in dataset.places}
    paths = np.concatenate([split.images for split in splits.values()])
    size = usual_size(_evenly(paths))
    if max(size) > LARGEST:
        return streamed(dataset)
    try:
        images, damaged = decode(paths, size, workers)
    except OtherSize as other:
        remark = (
            f"All images are scaled to {IMAGE_SIZE} x {IMAGE_SIZE} and read in every epoch, because they are of more "
            f"than one size: {other}. Images of one size, at most {LARGEST} x {LARGEST}, stay as they are, in memory."
        )
        return streamed(replace(dataset, remarks=[*dataset.remarks, remark]))

    dataset.skipped.add({paths[index]: reason for index, reason in damaged.items()})
    decoded = Split(images, np.concatenate([split.targets for split in splits.values()]))
    use_of = np.repeat(list(splits), list(map(len, splits.values())))
    use_of[list(damaged)] = ""
    for use in splits:
        splits[use] = decoded[use_of == use]
        if not len(splits[use]):
            raise UserError(f"none of the images in {dataset.places[use]} can be read: repair them")
    padding = images.shape[1] // 8  # 4 pixels of 32, as in CIFAR's recipe
    mean, std = channel_statistics(splits["train"].images)
    remarks = [*dataset.remarks, *_likeness(splits["train"].images)]
    return replace(dataset, **splits, mean=mean, std=std, padding=padding, remarks=remarks)


def streamed(dataset: DataSet, image_size: int | None = None) -> DataSet:
    """The data set with crops of its images, which are read from their files in every epoch."""
    remarks = [*dataset.remarks, *_likeness(_readable(_evenly(dataset.train.images)))]
    return replace(dataset, image_size=image_size or IMAGE_SIZE, remarks=remarks)


def _evenly(paths: np.ndarray) -> np.ndarray:
    """Up to COMPARED of the paths, from the first to the last."""
    return paths[np.unique(np.linspace(0, len(paths) - 1, COMPARED).round().astype(int))]


def _readable(paths: Sequence[bytes]) -> Iterator[np.ndarray]:
    for path in paths:
        with suppress(DamagedImage):
            yield np.asarray(read(path))


def _likeness(images: Iterator[np.ndarray] | np.ndarray) -> list[str]:
    """A remark if several images are all alike; the first that differs is the last that is looked at."""
    count = 1
    for image, following in pairwise(images):
        if not np.array_equal(image, following):
            return []
        count += 1
    text = f"{count:,} training images were compared, and all of them are alike, pixel by pixel: look into the files."
    return [text] if count > 1 else []
