"""Data sets in, batches out. Small images stay in memory, on the training device, as one uint8 tensor."""

from dataclasses import dataclass
from pathlib import Path

from data.folder import folder
from data.sources import Source, Split, cifar, digits, stratified_split
from utils.errors import UserError

DOWNLOADS = Path(__file__).with_name("downloads")
NAMES = ("digits", "cifar10", "cifar100", "folder")


@dataclass(frozen=True)
class DataSet:
    """A data set cut into training, validation and test images; `source` has its classes and statistics.

    With val_size 0, `val` is `test`.
    """

    name: str
    source: Source
    train: Split
    val: Split
    test: Split

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width


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
        source = digits()
    elif name == "folder":
        if data_dir is None:
            raise UserError("--dataset folder needs --data_dir, the folder with train/<class>/* and test/<class>/*")
        source = folder(data_dir, workers)
    else:
        source = cifar(name, data_dir or DOWNLOADS)

    if len(source.train) < 2:
        raise UserError(f"{name} has {len(source.train)} training image: at least 2 are needed")
    if val_size == 0:
        return DataSet(name, source, source.train, source.test, source.test)
    if source.val is not None:
        return DataSet(name, source, source.train, source.val, source.test)
    count = len(source.train)
    size = max(1, round(val_size * count)) if val_size < 1 else int(val_size)
    if size >= count - 1:
        raise UserError(f"--val_size {val_size:g} leaves nothing to train on: there are {count} training images")
    val, train = stratified_split(source.train.targets, size)
    return DataSet(name, source, source.train[train], source.train[val], source.test)
