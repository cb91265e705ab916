"""Small data sets that torchvision knows, downloaded where they are missing, as uint8 images in memory."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.sources import DataSet, Split, channel_statistics
from utils.errors import UserError
from utils.normalization import NORMALIZATIONS, MeanStd

# torchvision is imported where it is needed: that takes a second, which the other data sets need not pay.


def _read_cifar(class_name: str, data_dir: Path, split: str) -> tuple[np.ndarray, Sequence[int], list[str]]:
    from torchvision import datasets

    dataset = getattr(datasets, class_name)(data_dir, split == "train", download=True)
    return dataset.data, dataset.targets, dataset.classes


def _read_fashion_mnist(data_dir: Path, split: str) -> tuple[np.ndarray, Sequence[int], list[str]]:
    from torchvision.datasets import FashionMNIST

    dataset = FashionMNIST(data_dir, split == "train", download=True)
    return np.repeat(dataset.data.numpy()[..., None], 3, axis=-1), dataset.targets.tolist(), dataset.classes


def _read_svhn(data_dir: Path, split: str) -> tuple[np.ndarray, Sequence[int], list[str]]:
    require_scipy("svhn")
    from torchvision.datasets import SVHN

    dataset = SVHN(data_dir, split, download=True)
    images = np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1))
    return images, dataset.labels, [str(digit) for digit in range(10)]


class Published(NamedTuple):
    """A data set that others published.

    Attributes:
        read: (data_dir, "train" or "test") -> (n, H, W, 3) uint8 images, their targets, the names of the classes.
        path: where torchvision keeps a split, below data_dir.
        flip, border: as DataSet has them; with the border, images are 32 x 32.
        statistics: mean and std; None: those of the training images.
    """

    read: Callable[[Path, str], tuple[np.ndarray, Sequence[int], list[str]]]
    path: str
    flip: bool
    border: int = 0
    statistics: MeanStd | None = None


PUBLISHED = {
    "cifar10": Published(
        partial(_read_cifar, "CIFAR10"),
        path="cifar-10-batches-py",
        flip=True,
        statistics=NORMALIZATIONS["cifar"],
    ),
    "cifar100": Published(
        partial(_read_cifar, "CIFAR100"),
        path="cifar-100-python",
        flip=True,
        statistics=NORMALIZATIONS["cifar100"],
    ),
    "fashion_mnist": Published(_read_fashion_mnist, path="FashionMNIST", flip=True, border=2),
    "svhn": Published(_read_svhn, path="{split}_32x32.mat", flip=False),
}


def published(name: str, data_dir: Path) -> DataSet:
    """One of PUBLISHED, from data_dir, or downloaded into it.

    Raises:
        UserError: it is damaged, or neither there nor to be downloaded.
    """
    source = PUBLISHED[name]
    (train, classes), (test, _) = (_read(name, data_dir, split) for split in ("train", "test"))
    mean, std = source.statistics or channel_statistics(train.images)
    return DataSet(name, classes, train, test, mean, std, padding=4, flip=source.flip, border=source.border)


def require_scipy(what: str) -> None:
    """Raise a UserError where scipy, which torchvision reads `what` with, is not installed."""
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what} comes in MATLAB files, which scipy reads: pip install scipy") from error


def _read(name: str, data_dir: Path, split: str) -> tuple[Split, list[str]]:
    """A split and the names of its classes."""
    path = data_dir / PUBLISHED[name].path.format(split=split)
    was_there = path.exists()
    try:
        images, targets, classes = PUBLISHED[name].read(data_dir, split)
        if not 0 < len(images) == len(targets):
            raise ValueError(f"{len(images):,} images, {len(targets):,} labels")
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())
        if was_there:
            problem = f"{path} is damaged or not complete ({reason}): delete it to have {name} downloaded anew"
        else:
            problem = (
                f"{name} is not in {data_dir} and could not be downloaded ({reason}): put {path.name} there, name the "
                "right folder with --data_dir, or try --dataset digits, which needs no download"
            )
        raise UserError(problem) from error
    if border := PUBLISHED[name].border:
        images = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
    return Split(images, np.array(targets)), classes
