"""Data sets in, batches out.

Small images stay in memory, on the training device, as one uint8 tensor; others stream from their files.
"""

from dataclasses import replace
from pathlib import Path

from data.folder import folder, imagenet
from data.published import PUBLISHED, published
from data.sources import DataSet, digits, stratified_split
from utils.errors import UserError

DOWNLOADS = Path(__file__).with_name("downloads")
NAMES = ("digits", *PUBLISHED, "imagenet", "folder")


def load(name: str, data_dir: Path | None, val_size: float, workers: int = 1, image_size: int | None = None) -> DataSet:
    """Load a data set by name and split the validation set from its training set.

    The split is stratified and depends on the data and val_size alone, so that a pretrained teacher, its students and
    their refinement, whatever their seeds, validate on the same images and train on none of them.

    Args:
        data_dir: None for the default, data/downloads; the digits need none, imagenet and folder need their own.
        val_size: a fraction below 1 or a number of images. 0: validate on the test set.
        workers: threads that decode small images.
        image_size: pixels on each side of streamed images; None: 224, and small images of one size do not stream.

    Raises:
        UserError: an unknown name, data that is missing or malformed, an image_size for images that do not stream, a
            val_size that leaves nothing to train on.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set '{name}': choose from {', '.join(NAMES)}")
    if name in ("imagenet", "folder"):
        if data_dir is None:
            raise UserError(f"--dataset {name} needs --data_dir, the folder with train/<class>/* and val/<class>/*")
        dataset = imagenet(data_dir, image_size) if name == "imagenet" else folder(data_dir, workers, image_size)
    elif image_size:
        raise UserError(f"--image_size is for imagenet and folder: {name} has images of one size, leave it out")
    else:
        dataset = digits() if name == "digits" else published(name, data_dir or DOWNLOADS)

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
