"""Data sets that torchvision downloads or unpacks: small ones go to memory, ImageNet streams."""

import inspect
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import classified_files, is_image
from data.folder import streamed
from data.sources import DataSet, Split, channel_statistics
from utils.distributed import first_on_each_machine
from utils.errors import UserError
from utils.normalization import NORMALIZATIONS, MeanStd

# torchvision is imported inside functions: it takes a second, which the other data sets do not need.


class TorchvisionSet(NamedTuple):
    """A small data set in torchvision.datasets.

    Attributes:
        class_name: class in torchvision.datasets.
        path: file or folder of a split, below data_dir.
        flip, border: as in DataSet; with the border, images are 32 x 32.
        statistics: mean and std; None: those of the training images.
    """

    class_name: str
    path: str
    flip: bool
    border: int = 0
    statistics: MeanStd | None = None

    def load(self, name: str, data_dir: Path) -> DataSet:
        """Read the data set from data_dir, or download it there.

        Raises:
            UserError: it is damaged, or missing and cannot be downloaded.
        """
        with first_on_each_machine():
            (train, classes), (test, _) = (self._read(name, data_dir, split) for split in ("train", "test"))
        mean, std = self.statistics or channel_statistics(train.images)
        return DataSet(name, classes, train, test, mean, std, padding=4, flip=self.flip, border=self.border)

    def _read(self, name: str, data_dir: Path, split: str) -> tuple[Split, list[str]]:
        """A split and the names of its classes."""
        path = data_dir / self.path.format(split=split)
        was_there = path.exists()
        try:
            return self._arrays(data_dir, split)
        except ImportError as error:
            raise _scipy_missing(name) from error
        except Exception as error:  # a damaged file can raise anything
            reason = " ".join(str(error).split())
            problem = (
                f"{name} is not in {data_dir} and could not be downloaded ({reason}): put {path.name} there, name "
                "the right folder with --data_dir, or try --dataset digits, which needs no download"
            )
            if was_there:
                problem = f"{path} is damaged or not complete ({reason}): delete it to have {name} downloaded again"
            raise UserError(problem) from error

    def _arrays(self, data_dir: Path, split: str) -> tuple[Split, list[str]]:
        from torchvision import datasets

        factory = getattr(datasets, self.class_name)
        named = "split" in inspect.signature(factory).parameters  # else: train=True or False
        dataset = factory(data_dir, split if named else split == "train", download=True)
        images, targets = np.asarray(dataset.data), np.asarray(getattr(dataset, "labels" if named else "targets"))
        if not 0 < len(images) == len(targets):
            raise ValueError(f"{len(images):,} images, {len(targets):,} labels")
        if images.ndim == 3:  # gray
            images = np.repeat(images[..., None], 3, axis=-1)
        elif images.shape[1] == 3:  # (n, C, H, W)
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        if border := self.border:
            images = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
        return Split(images, targets), getattr(dataset, "classes", [str(digit) for digit in range(10)])


TORCHVISION_SETS = {
    "cifar10": TorchvisionSet("CIFAR10", "cifar-10-batches-py", flip=True, statistics=NORMALIZATIONS["cifar"]),
    "cifar100": TorchvisionSet("CIFAR100", "cifar-100-python", flip=True, statistics=NORMALIZATIONS["cifar100"]),
    "fashion_mnist": TorchvisionSet("FashionMNIST", "FashionMNIST", flip=True, border=2),
    "svhn": TorchvisionSet("SVHN", "{split}_32x32.mat", flip=False),
}


def imagenet(data_dir: Path, image_size: int | None = None) -> DataSet:
    """ImageNet-1k, or any tree like it: train/<wnid>/*, and val/<wnid>/* as the test set, both streamed.

    If data_dir holds the archives and the devkit as downloaded, they are unpacked first, which takes disk space and
    time.

    Raises:
        UserError: neither is there, or it is incomplete.
    """
    root = data_dir.resolve()
    with first_on_each_machine():
        for split in ("train", "val"):
            _unpack(root, split)
    return streamed(classified_files("imagenet", root, ("train", "val")), image_size)


def _unpack(root: Path, split: str) -> None:
    """Let torchvision unpack a split of ImageNet, unless its folder is there, and check that it is complete.

    torchvision sorts the images, and unpacks the inner archives, after it has unpacked the outer one. People may keep
    the inner archives beside the classes, too.
    """
    folder, archive = root / split, root / f"ILSVRC2012_img_{split}.tar"
    if not folder.exists() and archive.exists():
        from torchvision.datasets import ImageNet

        print(f"unpacking {archive}, once", flush=True)
        try:
            ImageNet(root, split)
        except ImportError as error:
            raise _scipy_missing("imagenet's devkit") from error
        except (RuntimeError, EOFError) as error:
            raise UserError(f"{root} cannot be unpacked: {error}") from error

    files = sorted(path for path in folder.glob("*") if path.is_file())
    if loose := list(filter(is_image, files)):
        source = "ILSVRC2012_validation_ground_truth.txt of the devkit has their classes"
        source = "their names begin with it" if split == "train" else source
        advice = f"move each into the folder of its class, {split}/<wnid>; {source}"
        if archive.exists():
            advice = f"rename {folder} and run again, which unpacks {archive.name} again"
        raise UserError(f"{folder} has {len(loose):,} images in no class folder, such as {loose[0]}: {advice}")
    for path in files:
        if path.suffix == ".tar" and not _is_unpacked(path):
            target = path.with_suffix("")
            raise UserError(
                f"{path} is not unpacked completely: mkdir -p {target} && tar -xf {path} -C {target}, or move it "
                "elsewhere if all of its images are there"
            )


def _is_unpacked(archive: Path) -> bool:
    """Whether all files of an archive are in the folder of its name, in their sizes."""
    folder = archive.with_suffix("")
    try:
        with tarfile.open(archive, "r:") as tar:
            files = (member for member in tar if member.isfile())
            return all((folder / file.name).stat().st_size == file.size for file in files)
    except (OSError, tarfile.TarError):
        return False


def _scipy_missing(what: str) -> UserError:
    return UserError(f"{what} comes in MATLAB files, which scipy reads: pip install scipy")
