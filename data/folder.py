"""Trees of image files, `train/<class>/*` and `test|val/<class>/*`: small images go to memory, others stream."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.images import SkippedImages, read_small
from data.sources import DataSet, Split, channel_statistics
from utils.errors import UserError
from utils.normalization import NORMALIZATIONS, MeanStd

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "expected train/<class>/* and test/<class>/* (or val/<class>/*)"
LARGEST = 64  # pixels on each side of images that are kept in memory
IMAGE_SIZE = 224  # default height and width of streamed images


def folder(data_dir: Path, workers: int, image_size: int | None = None) -> DataSet:
    """Load the images under data_dir. With both test/ and val/, val/ is the validation set.

    Images of a single size of at most LARGEST x LARGEST are kept in memory unless image_size is given.

    Raises:
        UserError: as `image_tree`, or too many images cannot be read.
    """
    root = data_dir.resolve()
    classes, splits = image_tree(root, ("train", "test", "val"))
    paths = np.concatenate([split.images for split in splits.values()])
    small = None if image_size else read_small(paths, LARGEST, workers)
    if small is None:
        return streamed("folder", classes, splits, image_size)

    images, damaged = small
    skipped = SkippedImages(len(paths))
    skipped.add({paths[index]: reason for index, reason in damaged.items()})
    start = 0
    for name, split in splits.items():
        kept = np.setdiff1d(np.arange(start, start + len(split)), list(damaged))
        if not len(kept):
            raise UserError(f"none of the images in {root / name} can be read: repair them")
        splits[name] = Split(images[kept], split.targets[kept - start])
        start += len(split)
    padding = images.shape[1] // 8  # 4 pixels of 32, as in CIFAR's recipe
    return _data_set("folder", classes, splits, channel_statistics(splits["train"].images), padding, skipped)


def streamed(name: str, classes: list[str], splits: dict[str, Split], image_size: int | None) -> DataSet:
    """A data set whose images are read from their files in every epoch."""
    skipped = SkippedImages(sum(map(len, splits.values())))
    dataset = _data_set(name, classes, splits, NORMALIZATIONS["imagenet"], padding=0, skipped=skipped)
    return replace(dataset, image_size=image_size or IMAGE_SIZE)


def _data_set(
    name: str,
    classes: list[str],
    splits: dict[str, Split],
    statistics: MeanStd,
    padding: int,
    skipped: SkippedImages,
) -> DataSet:
    """The splits in their roles: val/ is the test set if there is no test/."""
    roles = splits if "test" in splits else {"train": splits["train"], "test": splits["val"]}
    mean, std = statistics
    return DataSet(name, classes, **roles, mean=mean, std=std, padding=padding, flip=True, skipped=skipped)


def image_tree(root: Path, names: Sequence[str]) -> tuple[list[str], dict[str, Split]]:
    """The classes in root/train, and the image files of each split in `names` that exists, sorted by class and name.

    Raises:
        UserError: the tree is missing, a split has no images or a class that train lacks, or classes are too few.
    """
    names = [name for name in names if (root / name).is_dir()]
    if "train" not in names:
        raise UserError(f"{root} has no folder train: {LAYOUT}")
    if len(names) == 1:
        raise UserError(f"{root} has neither test nor val: {LAYOUT}")
    classes = _class_names(root / "train")
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} holds {len(classes)} class folder(s), at least 2 are needed: {LAYOUT}")
    splits = {}
    for name in names:
        if unknown := sorted(set(_class_names(root / name)) - set(classes)):
            raise UserError(f"{root / name} has a class that train does not have: {unknown[0]}")
        found = [_image_files(root / name / class_name) for class_name in classes]
        if name == "train" and not all(found):
            raise UserError(f"no images in {root / name / classes[found.index([])]}: add some, or remove the class")
        if not any(found):
            raise UserError(f"no images in {root / name}: {LAYOUT}")
        # Bytes take a fraction of the memory of a million strings, and worker processes share them.
        paths = np.array([os.fsencode(path) for files in found for path in files])
        splits[name] = Split(paths, np.repeat(np.arange(len(classes)), [len(files) for files in found]))
    return classes, splits


def _class_names(split: Path) -> list[str]:
    return sorted(entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(top: Path) -> list[str]:
    def stop(error: OSError) -> None:
        raise error

    if not top.exists():  # a class may be missing from the test set
        return []
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(top, onerror=stop) for name in names]
    return sorted(path for path in paths if path.lower().endswith(EXTENSIONS))
