"""Data sets in, batches out. Small images stay in memory, on the training device, as one uint8 tensor."""

from dataclasses import replace
from pathlib import Path

from data.folder import folder
from data.sources import DataSet, cifar, digits, stratified_split
from utils.errors import UserError

DOWNLOADS = Path(__file__).with_name("downloads")
NAMES = ("digits", "cifar10", "cifar100", "folder")


def load(name: str, data_dir: Path | None, val_size: float, workers: int = 1) -> DataSet:
    """Load a data set by name and split the validation set from its training set.

    The split is stratified and depends on the data and val_size alone, so that a pretrained teacher, its students and
    their refinement, whatever their seeds, validate on the same images and train on none of them.

    Args:
        data_dir: None for the default, data/downloads; the digits need none, a folder needs its own.
        val_size: a fraction below 1 or a number of images. 0: validate on the test set.

    Raises:
        UserError: an unknown name, data that is missing or malformed, a val_size that leaves nothing to train on.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set '{name}': choose from {', '.join(NAMES)}")
    if name == "digits":
        dataset = digits()
    elif name == "folder":
        if data_dir is None:
            raise UserError("--dataset folder needs --data_dir, the folder with train/<class>/* and test/<class>/*")
        dataset = folder(data_dir, workers)
    else:
        dataset = cifar(name, data_dir or DOWNLOADS)

    count = len(dataset.train)
    if count < 2:
        raise UserError(f"{name} has {count} training image: at least 2 are needed")
    if val_size == 0:
        return replace(dataset, val=dataset.test)
    if dataset.val is not None:
        return dataset
    size = max(1, round(val_size * count)) if val_size < 1 else int(val_size)
    if size >= count - 1:
        raise UserError(f"--val_size {val_size:g} leaves nothing to train on: there are {count} training images")
    val, train = stratified_split(dataset.train.targets, size)
    return replace(dataset, train=dataset.train[train], val=dataset.train[val])
