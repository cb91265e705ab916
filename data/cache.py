"""Folders of small images of one size: decoded once, then loaded from a cache beside the folder."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.images import DamagedImage, SkippedImages, read, read_size
from utils.errors import UserError
from utils.files import atomic_write

LARGEST = 64  # pixels on a side


class Decoded(NamedTuple):
    """images: (n, H, W, 3) uint8, of the files that can be read; kept: (n,) their indices among all the files."""

    images: np.ndarray
    kept: np.ndarray


def small_images(root: Path, paths: np.ndarray, skipped: SkippedImages, workers: int) -> Decoded | None:
    """The images of the files `paths` below root, from the cache if it matches; decoded and cached if not.

    None if they are not all of one size of at most LARGEST x LARGEST.

    Raises:
        UserError: too many of them cannot be read.
    """
    cache = root.with_name(f"{root.name}.cache.npz")
    fingerprint = _fingerprint(root, paths) if cache.is_file() else None  # a look at every file, so only if of use
    content = _load(cache, fingerprint, len(paths)) if fingerprint else None
    if content:
        skipped.add(_by_path(paths, content))
    else:
        size = _common_size(paths)
        if size is None:
            return None
        content = _decode(paths, size, workers)
        skipped.add(_by_path(paths, content))
        try:
            with atomic_write(cache) as file:
                np.savez(file, fingerprint=fingerprint or _fingerprint(root, paths), **content)
        except UserError as error:
            print(f"{error}; the images will be decoded again next time", flush=True)
    return Decoded(content["images"], np.delete(np.arange(len(paths)), content["damaged"]))


def _by_path(paths: np.ndarray, content: dict[str, np.ndarray]) -> dict[bytes, str]:
    return dict(zip(paths[content["damaged"]], content["reasons"].tolist(), strict=True))


def _fingerprint(root: Path, paths: np.ndarray) -> str:
    """Changes with the name, size or time of any file."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
            state = f"{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError as error:
            state = error.strerror
        digest.update(path.removeprefix(os.fsencode(root)) + f"\0{state}\0".encode())
    return digest.hexdigest()


def _load(cache: Path, fingerprint: str, count: int) -> dict[str, np.ndarray] | None:
    """What `_decode` made of `count` files; None if it was of other files, or the cache is damaged."""
    try:
        with np.load(cache, allow_pickle=False) as file:  # the archive's checksums reveal damage
            if str(file["fingerprint"]) != fingerprint:
                return None
            content = {name: file[name] for name in ("images", "damaged", "reasons")}
    except Exception:  # a damaged file can raise anything
        print(f"{cache} is damaged, or of another version: decoding the images again", flush=True)
        return None
    images, damaged = content["images"], content["damaged"]
    expected = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    expected = expected and len(images) + len(damaged) == count and len(damaged) == len(content["reasons"])
    return content if expected and damaged.dtype == np.int64 and np.isin(damaged, np.arange(count)).all() else None


def _common_size(paths: np.ndarray) -> tuple[int, int] | None:
    """(width, height) of all the images, judged by their headers; None if one is too large or unlike the others."""
    common = None
    for path in paths:
        try:
            size = read_size(path)
        except DamagedImage:
            continue
        if max(size) > LARGEST or size != (common or size):
            return None
        common = size
    return common or (1, 1)  # not one is an image: what reads them next will say so


def _decode(paths: np.ndarray, size: tuple[int, int], workers: int) -> dict[str, np.ndarray]:
    """images: (n, H, W, 3) uint8; damaged: (d,) indices of the files that cannot be read; reasons: (d,) why not."""
    width, height = size
    images = np.empty((len(paths), height, width, 3), np.uint8)

    def decode(index: int) -> str | None:
        try:
            images[index] = read(paths[index])
        except DamagedImage as error:
            return str(error)

    print(f"decoding {len(paths):,} images, once", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        outcomes = list(tqdm(pool.map(decode, range(len(paths))), "decoding", len(paths), unit=" images", disable=None))
    damaged = np.array([i for i, reason in enumerate(outcomes) if reason], dtype=np.int64)
    reasons = np.array([reason for reason in outcomes if reason], dtype=str)
    return {"images": np.delete(images, damaged, axis=0) if len(damaged) else images} | {
        "damaged": damaged, "reasons": reasons
    }  # fmt: skip
