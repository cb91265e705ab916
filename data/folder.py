"""Any tree of small images, `train/<class>/*` and `test|val/<class>/*`: decoded once, then loaded from a cache."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.sources import DataSet, Split, channel_statistics
from utils.errors import UserError
from utils.files import atomic_write

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "expected train/<class>/* and test/<class>/* (or val/<class>/*)"


def folder(data_dir: Path, workers: int) -> DataSet:
    """The images under data_dir. With both test/ and val/, val/ is the validation set.

    Raises:
        UserError: no such tree, a split without images, fewer than two classes, other classes in test than in train,
            an image that cannot be read or is of another size than the first.
    """
    root = data_dir.resolve()
    if not (root / "train").is_dir():
        raise UserError(f"{data_dir} has no folder train: {LAYOUT}")
    names = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    if len(names) == 1:
        raise UserError(f"{data_dir} has neither test nor val: {LAYOUT}")

    classes = _class_names(root / "train")
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} holds {len(classes)} class folder(s), at least 2 are needed: {LAYOUT}")
    files, targets, splits = [], [], {}
    for name in names:
        start = len(files)
        if unknown := sorted(set(_class_names(root / name)) - set(classes)):
            raise UserError(f"{root / name} has a class that train does not have: {unknown[0]}")
        for target, class_name in enumerate(classes):
            found = _image_files(root / name / class_name)
            if name == "train" and not found:
                raise UserError(f"no images in {root / name / class_name}: add some, or remove the class")
            files += found
            targets += [target] * len(found)
        if len(files) == start:
            raise UserError(f"no images in {root / name}: {LAYOUT}")
        splits[name] = slice(start, len(files))
    images = Split(_cached_images(root, files, workers), np.array(targets))

    train = images[splits["train"]]
    mean, std = channel_statistics(train.images)
    return DataSet(
        name="folder",
        classes=classes,
        train=train,
        test=images[splits["test" if "test" in splits else "val"]],
        val=images[splits["val"]] if len(splits) == 3 else None,
        mean=mean,
        std=std,
        padding=train.images.shape[1] // 8,  # 4 pixels of 32, as CIFAR's recipe
        flip=True,
    )


def _class_names(split: Path) -> list[str]:
    return sorted(entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(top: Path) -> list[str]:
    def stop(error: OSError) -> None:
        if top.exists():  # a class may be missing from the test set
            raise error

    paths = [os.path.join(parent, name) for parent, _, names in os.walk(top, onerror=stop) for name in names]
    return sorted(path for path in paths if path.lower().endswith(EXTENSIONS))


def _cached_images(root: Path, files: list[str], workers: int) -> np.ndarray:
    """(n, H, W, 3) images of `files` from the cache beside the folder; decoded and cached if it does not match."""
    cache = root.with_name(f"{root.name}.cache.npz")
    fingerprint = _fingerprint(root, files)
    images = _load_cache(cache, fingerprint, len(files))
    if images is None:
        images = _decode(files, workers)
        try:
            with atomic_write(cache) as file:
                np.savez(file, fingerprint=fingerprint, images=images)
        except UserError as error:
            print(f"{error}; the images will be decoded again next time", flush=True)
    return images


def _load_cache(cache: Path, fingerprint: str, count: int) -> np.ndarray | None:
    try:
        with np.load(cache, allow_pickle=False) as file:  # the archive's checksums reveal damage
            if str(file["fingerprint"]) != fingerprint:
                return None
            images = file["images"]
    except FileNotFoundError:
        return None
    except Exception:  # a damaged file can raise anything
        print(f"{cache} is damaged: decoding the images again", flush=True)
        return None
    expected = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count and images.shape[-1] == 3
    return images if expected else None


def _fingerprint(root: Path, files: Sequence[str]) -> str:
    """Changes with the name, size or time of any file."""
    digest = hashlib.sha256()
    for path in files:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read the image {path} ({error.strerror}): repair or delete it") from error
        name = path.removeprefix(str(root))
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode(files: Sequence[str], workers: int) -> np.ndarray:
    first = _read(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)

    def decode(index: int) -> None:
        image = _read(files[index])
        if image.shape != first.shape:
            sizes = (f"{path} is {a.shape[1]} x {a.shape[0]}" for path, a in ((files[0], first), (files[index], image)))
            raise UserError(f"images differ in size, {', '.join(sizes)}: resize them to one size first")
        images[index] = image

    print(f"decoding {len(files):,} images, once", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        for _ in tqdm(pool.map(decode, range(len(files))), "decoding", len(files), unit=" images", disable=None):
            pass
    return images


def _read(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip rather than scale
                return np.repeat((np.asarray(image) // 257).astype(np.uint8)[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a damaged image can raise anything
        raise UserError(f"cannot read the image {path} ({error}): repair or delete it") from error
