"""Batches of streamed images: worker processes read, crop and scale them, the device normalizes them."""

import atexit
import signal
import traceback
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, resource_tracker
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.images import DamagedImage, SkippedImages
from data.loader import Normalization, epoch_seed, without_a_small_last
from data.sources import Split
from utils import distributed
from utils.distributed import share
from utils.errors import UserError


class Order:
    """A batch sampler that requests each image as (index, seed), in order or, with a seed, shuffled.

    A shuffled order and its seeds depend only on (seed, epoch), and each process gets its share of every batch. The
    seeds are sent with the indices because worker processes do not see attributes that change after they start.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None = None):
        self.num_images = count if seed is None else without_a_small_last(count, batch_size)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = self.start = 0  # the batch to begin with

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = seeds = torch.arange(self.count)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator)[: self.num_images]
            seeds = torch.randint(2**32, (self.count,), generator=generator)  # more bits than 32 would be ignored
        for indices in order.split(self.batch_size)[self.start :]:
            requests = list(zip(indices.tolist(), seeds[indices].tolist(), strict=True))
            yield requests if self.seed is None else requests[share(len(requests))]


class ImageFiles(Dataset):
    """Reads and crops batches of a split, with random numbers from the seed that comes with each index.

    A batch: (B, S, S, 3) uint8 images and (B,) targets, or two empty lists if no image can be read; and the reasons why
    images cannot be read, by path.
    """

    def __init__(self, split: Split, crop: Callable[[bytes, int], Tensor]):
        self.split, self.crop = split, crop

    def __getitem__(self, requests: list[tuple[int, int]]) -> tuple[Any, Any, dict[bytes, str]]:
        good, damaged = [], {}
        for index, seed in requests:
            path = self.split.images[index]
            try:
                good.append((self.crop(path, seed).permute(1, 2, 0), int(self.split.targets[index])))
            except DamagedImage as error:
                damaged[path] = str(error)
        images, targets = default_collate(good) if good else ([], [])
        return images, targets, damaged


class StreamedBatches:
    """Normalized batches: (B, 3, S, S) float32 in channels_last, and (B,) targets; like data.loader.Batches.

    Images that cannot be read are left out, so that a batch may be smaller than the others, or missing. In training,
    all processes of a run iterate in step; in evaluation, each iterates over its own images.

    Args:
        crop: reads an image file: path, seed -> (3, S, S) uint8.
        workers: processes that read images; with 0, this process does. Workers for training persist between epochs.
        skipped: collects the images that cannot be read.
        seed: of the order in training, which leaves out batches with fewer than two images in a process.

    Attributes:
        position: batches of the epoch so far, including those that were left out or are before the start.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        crop: Callable[[bytes, int], Tensor],
        normalize: Normalization,
        workers: int,
        skipped: SkippedImages,
        seed: int | None = None,
    ):
        self.normalize, self.skipped, self.training = normalize, skipped, seed is not None
        self.order = Order(len(split), batch_size, seed)
        self.num_images = self.order.num_images  # including damaged ones
        self.loader = DataLoader(
            ImageFiles(split, crop),
            sampler=self.order,
            batch_size=None,  # ImageFiles makes the batches
            num_workers=workers,
            pin_memory=normalize.device.type == "cuda",
            persistent_workers=self.training and workers > 0,
            generator=torch.Generator(),  # for the seeds of workers; the global one belongs to the networks
        )

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration, which seeds its random numbers, and the batch (from 0) to start with."""
        self.order.epoch, self.order.start = epoch, start
        self.position = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        none_yet = self.order.start == 0
        if self.training:
            self.skipped.share()
        for position, (images, targets, found) in enumerate(self._loaded(), start=self.order.start + 1):
            self.position = position
            large_enough = len(targets) >= 1 + self.training
            if self.training:
                parts, sufficient = zip(*distributed.gathered((found, large_enough)), strict=True)
                found, large_enough = ChainMap(*parts), all(sufficient)
            self.skipped.add(found)
            if large_enough:
                none_yet = False
                yield self.normalize(images), targets.to(self.normalize.device, non_blocking=True)
        if none_yet and self.training:
            needed = 2 * distributed.world_size()
            raise UserError(f"there is no batch of {needed} images that can be read: repair them")

    def _loaded(self) -> Iterator[tuple[Any, Any, dict[bytes, str]]]:
        """Batches of `ImageFiles`."""
        iterator = None
        try:
            with _signals_blocked():
                iterator = iter(self.loader)
            _iterators.add(iterator)
            yield from iterator
        except OSError as error:  # a worker's message is its traceback, with the error in the last line
            # The garbage collector may finalize their queues first, and they would never end.
            _end_workers(iterator or _unfinished_iterator(error))
            raise UserError(f"reading images fails: {str(error).splitlines()[-1]}") from error
        finally:
            if not self.loader.persistent_workers:
                _end_workers(iterator)


_iterators = weakref.WeakSet()  # iterators of DataLoaders
_workers = weakref.WeakSet()  # their processes


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Workers that start within this context do not get the signals that this process handles in Python.

    A terminal or a job scheduler signals all processes of a group. The workers would end with a traceback before this
    process is ready to end. SIGCHLD stays: a fork server, which may start here, learns by it which workers have ended.
    """
    handled = {number for number in signal.valid_signals() if callable(signal.getsignal(number))} - {signal.SIGCHLD}
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, handled), set(active_children())
    try:
        resource_tracker.ensure_running()  # multiprocessing would start it, and thereby unblock SIGINT and SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        yield
    finally:
        _workers.update(set(active_children()) - others)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unfinished_iterator(error: OSError) -> Any:
    """The iterator of a DataLoader that could not start all of its workers, completed so that it can end the others.

    Otherwise torch prints an AttributeError when the iterator is deleted.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        if hasattr(iterator, "_shutdown_workers"):
            iterator._workers_status = [True] * len(iterator._workers)
            return iterator
    return None


def _end_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator, if it has any."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


@atexit.register
def _end_all_workers() -> None:
    """End all workers before multiprocessing sends them SIGTERM, which they may block, and waits for them."""
    try:
        for iterator in list(_iterators):
            _end_workers(iterator)
    finally:  # a worker may be stuck, or its iterator may be gone
        for worker in list(_workers):
            worker.kill()
