"""Folders of image files with their classes, from a tree or a CSV file: small images go to memory, others stream."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.images import DamagedImage, OtherSize, SkippedImages, decode, read, usual_size
from data.labels import labeled_files
from data.sources import DataSet, Split, channel_statistics
from data.tree import Found, classified_files
from utils.errors import UserError
from utils.normalization import NORMALIZATIONS

LARGEST = 64  # pixels on each side of images that are kept in memory
IMAGE_SIZE = 224  # default height and width of streamed images
COMPARED = 16  # images of which sizes and pixels are compared before they stream


def folder(data_dir: Path, workers: int, image_size: int | None = None, labels: Path | None = None) -> DataSet:
    """Load the images under data_dir. With both test/ and val/, val/ is the validation set.

    Images of a single size of at most LARGEST x LARGEST are kept in memory unless image_size is given.

    Args:
        labels: a CSV file with the classes of the images, see `labeled_files`. Default: they are in class folders.

    Raises:
        UserError: as `classified_files`, `labeled_files` and `data_set`, or too many images cannot be read.
    """
    root = data_dir.resolve()
    found = labeled_files(root, labels) if labels else classified_files(root, ("train", "test", "val"))
    dataset = data_set("folder", found)
    if image_size:
        return streamed(dataset, image_size)
    splits = {use: getattr(dataset, use) for use in ("train", "test", "val") if getattr(dataset, use)}
    paths = np.concatenate([split.images for split in splits.values()])
    size = usual_size(paths[_evenly(len(paths))])
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
    uses = np.repeat(list(splits), list(map(len, splits.values())))
    uses[list(damaged)] = ""
    for use in splits:
        splits[use] = decoded[uses == use]
        if not len(splits[use]):
            place = found.places.get(use) or found.places["val"]
            raise UserError(f"none of the images in {place} can be read: repair them")
    padding = images.shape[1] // 8  # 4 pixels of 32, as in CIFAR's recipe
    mean, std = channel_statistics(splits["train"].images)
    remarks = [*dataset.remarks, *_likeness(splits["train"].images)]
    return replace(dataset, **splits, mean=mean, std=std, padding=padding, remarks=remarks)


def streamed(dataset: DataSet, image_size: int | None = None) -> DataSet:
    """The data set with crops of its images, which are read from their files in every epoch."""
    paths = dataset.train.images
    remarks = [*dataset.remarks, *_likeness(_readable(paths[_evenly(len(paths))]))]
    return replace(dataset, image_size=image_size or IMAGE_SIZE, remarks=remarks)


def data_set(name: str, found: Found) -> DataSet:
    """The paths of image files, sorted by class and path. Without a split test, val is the test set.

    Raises:
        UserError: a split has no images or a class that train lacks, or classes are too few.
    """
    classes = sorted(found.files["train"])
    if len(classes) < 2:
        raise UserError(
            f"{found.places['train']} holds {len(classes)} class(es), at least 2 are needed: {found.layout}"
        )
    splits = {}
    for use, by_class in found.files.items():
        if unknown := sorted(by_class.keys() - classes):
            raise UserError(f"{found.places[use]} has a class that train does not have: {unknown[0]}")
        if not any(by_class.values()):
            raise UserError(f"no images in {found.places[use]}: {found.layout}")
        files = [sorted(by_class.get(name, [])) for name in classes]
        if use == "train" and not all(files):
            raise UserError(
                f"no images in {found.places[use]} of the class {classes[files.index([])]}: add some that Pillow reads"
            )
        # Bytes take a fraction of the memory of a million strings, and worker processes share them.
        paths = np.array([os.fsencode(path) for paths in files for path in paths])
        splits[use] = Split(paths, np.repeat(np.arange(len(classes)), list(map(len, files))))
    if "test" not in splits:
        splits["test"] = splits.pop("val")
    mean, std = NORMALIZATIONS["imagenet"]
    skipped = SkippedImages(sum(map(len, splits.values())))
    return DataSet(
        name, classes, **splits, mean=mean, std=std, padding=0, flip=True, skipped=skipped, remarks=found.remarks
    )


def _evenly(count: int) -> np.ndarray:
    """Up to COMPARED indices from 0 to count - 1."""
    return np.unique(np.linspace(0, count - 1, COMPARED).round().astype(int))


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
