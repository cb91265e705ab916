"""Data sets that ship with the project or come from torchvision, as uint8 images in memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError


@dataclass(frozen=True)
class Split:
    """images: (n, H, W, 3) uint8; targets: (n,) int64 class indices."""

    images: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, indices: np.ndarray | slice) -> "Split":
        return Split(self.images[indices], self.targets[indices])


@dataclass(frozen=True)
class DataSet:
    """A data set: as its source gives it, and once `data.load` has split it.

    Attributes:
        val: validation images; None while not split, unless the data set brings its own. With val_size 0 it is `test`.
        mean, std: of each channel, of pixels in 0 .. 1.
        padding: pixels by which a random crop may move an image.
        flip: an image and its mirror image are of the same class.
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

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width


def digits() -> DataSet:
    """The 1,797 handwritten digits of data/DIGITS.md, 8 x 8; a fixed fifth of them is the test set."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        grey, targets = file["images"], file["targets"].astype(np.int64)
    images = np.repeat(np.round(grey * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    test, train = stratified_split(targets, 360)
    images = Split(images, targets)
    mean, std = channel_statistics(images[train].images)
    classes = [str(digit) for digit in range(10)]
    return DataSet("digits", classes, images[train], images[test], mean, std, padding=1, flip=False)


# The mean and std of the released code's recipe for CIFAR-10, and those usual for CIFAR-100 (weiaicunzai).
CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def cifar(name: str, data_dir: Path) -> DataSet:
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into data_dir where it is not there yet."""
    from torchvision import datasets  # takes a second, which the other data sets need not pay

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (dataset(data_dir, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {data_dir} and could not be downloaded ({error}): unpack its {dataset.filename} there, "
            "name the right folder with --data_dir, or try --dataset digits, which needs no download"
        ) from error
    mean, std = CIFAR_STATISTICS[name]
    splits = (Split(split.data, np.array(split.targets)) for split in (train, test))
    return DataSet(name, train.classes, *splits, mean=mean, std=std, padding=4, flip=True)


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel of (n, H, W, 3) uint8 images, in 0 .. 1; a constant channel counts as one step."""
    count, total, squares = images[..., 0].size, np.zeros(3), np.zeros(3)
    for start in range(0, len(images), 1000):  # bounds the memory of the float copy
        pixels = images[start : start + 1000] / np.float32(255)
        # Over images first: numpy adds long rows of pixels much faster than rows of 3.
        total += pixels.sum(0, dtype=np.float64).sum((0, 1))
        squares += np.square(pixels).sum(0, dtype=np.float64).sum((0, 1))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, (1 / 255) ** 2))
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def stratified_split(targets: np.ndarray, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `size` images drawn at random with every class in its proportion, and of the others, both in order."""
    order = np.random.default_rng(seed).permutation(len(targets))
    share = np.empty(len(targets))
    for label in np.unique(targets):
        members = order[targets[order] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    drawn = order[np.argsort(share[order], kind="stable")]
    return np.sort(drawn[:size]), np.sort(drawn[size:])
