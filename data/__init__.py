"""Data sets in, batches out.

Small images stay in memory, on the training device, as one uint8 tensor; others stream from their files.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.folder import folder
from data.loader import AugmentedBatches, Batches, Normalization
from data.sources import DataSet, digits, stratified_split
from data.streaming import StreamedBatches
from data.torchvision_sets import TORCHVISION_SETS, imagenet
from utils.distributed import share, world_size
from utils.errors import UserError

DOWNLOADS = Path(__file__).with_name("downloads")
NAMES = ("digits", *TORCHVISION_SETS, "imagenet", "folder")


def load(
    name: str,
    data_dir: Path | None,
    val_size: float,
    workers: int = 1,
    image_size: int | None = None,
    train_size: float | None = None,
    labels: Path | None = None,
) -> DataSet:
    """Load a data set by name and split a validation set from its training set.

    The split is stratified and depends only on the data and val_size. A pretrained teacher, its students and their
    refinement therefore validate on the same images, whatever their seeds, and train on none of them.

    Args:
        name: one of NAMES.
        data_dir: folder of the data. Default: data/downloads; imagenet and folder have no default.
        val_size: fraction (below 1) or number of training images to split off. 0 validates on the test set. A val/
            beside train/ and test/ is used as it is.
        workers: threads that decode images to memory.
        image_size: height and width of streamed images, by default 224. With it, small images stream, too.
        train_size: fraction (below 1) or number of the remaining training images to keep, stratified. Default: all.
        labels: CSV file with the classes of a folder's images, which then need no class folders (data/files.py).

    Raises:
        UserError: the name is unknown, the data is missing or malformed, image_size or labels are given for a data
            set that takes none, or val_size or train_size does not fit the number of images.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set '{name}': choose from {', '.join(NAMES)}")
    if labels and name != "folder":
        raise UserError(f"--labels is for --dataset folder: {name} has its own, leave it out")
    if name in ("imagenet", "folder"):
        if data_dir is None:
            raise UserError(f"--dataset {name} needs --data_dir, the folder with train/<class>/* and val/<class>/*")
        if name == "imagenet":
            dataset = imagenet(data_dir, image_size)
        else:
            dataset = folder(data_dir, workers, image_size, labels)
    elif image_size:
        raise UserError(f"--image_size is for imagenet and folder: {name} has images of one size, leave it out")
    else:
        dataset = digits() if name == "digits" else TORCHVISION_SETS[name].load(name, data_dir or DOWNLOADS)

    train, val = dataset.train, dataset.val
    if len(train) < 2:
        raise UserError(f"{name} has {len(train)} training image: at least 2 are needed")
    if val_size == 0:
        val = dataset.test
    elif val is None:
        size, count = max(1, _number_of(val_size, len(train))), len(train)
        if size >= count - 1:
            raise UserError(f"--val_size {val_size:g} leaves nothing to train on: there are {count} training images")
        val, train = (train[indices] for indices in stratified_split(train.targets, size))
    if train_size is not None:
        size, count = _number_of(train_size, len(train)), len(train)
        if not 2 <= size <= count:
            raise UserError(f"--train_size {train_size:g} is not between 2 and the {count} training images that remain")
        train = train[stratified_split(train.targets, size)[0]]
    return replace(dataset, train=train, val=val)


def _number_of(size: float, count: int) -> int:
    return round(size * count) if size < 1 else int(size)


def sample(dataset: DataSet, device: torch.device, workers: int, count: int = 512) -> list[Tensor]:
    """Up to `count` training images, stratified and not augmented, in batches of about 128; each process gets all."""
    count = min(count, len(dataset.train))
    chosen = stratified_split(dataset.train.targets, count)[0]
    part = dataset.train[np.repeat(chosen, world_size())]
    size = -(-count // -(-count // 128))
    loaders = make_loaders(replace(dataset, train=part, val=part), len(part), size, 0, device, workers)
    return [images for images, _ in loaders.val]


class Loaders(NamedTuple):
    train: AugmentedBatches | StreamedBatches
    val: Batches | StreamedBatches
    test: Batches | StreamedBatches


def make_loaders(
    dataset: DataSet, train_batch_size: int, eval_batch_size: int, seed: int, device: torch.device, workers: int
) -> Loaders:
    """Batches of the three splits, or this process's share of them; `train_batch_size` counts those of all processes.

    Raises:
        UserError: there are too few images for so many processes.
    """
    smallest = 2 * world_size()
    if min(train_batch_size, len(dataset.train)) < smallest:
        raise UserError(f"{world_size()} processes need batches of at least {smallest} training images, 2 for each")
    if min(len(dataset.val), len(dataset.test)) < world_size():
        raise UserError(f"{world_size()} processes need as many validation and test images: start fewer")
    val, test = (split[share(len(split))] for split in (dataset.val, dataset.test))
    if dataset.image_size:
        from data.crops import EvaluationCrop, TrainingCrop  # import torchvision, which takes a second

        common = (Normalization(dataset.mean, dataset.std, device), workers, dataset.skipped)
        train = StreamedBatches(dataset.train, train_batch_size, TrainingCrop(dataset.image_size), *common, seed)
        center = EvaluationCrop(dataset.preprocessing)
        val, test = (StreamedBatches(split, eval_batch_size, center, *common) for split in (val, test))
    else:
        common = (dataset.mean, dataset.std, device)
        augmentation = {"padding": dataset.padding, "flip": dataset.flip, "seed": seed}
        train = AugmentedBatches(dataset.train, train_batch_size, *common, **augmentation)
        val, test = (Batches(split, eval_batch_size, *common) for split in (val, test))
    return Loaders(train, val, test)
