"""Batches of images that stay in their files: processes read, crop and scale them, the device normalizes them."""

import atexit
import signal
import traceback
import weakref
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children, resource_tracker
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from data.images import DamagedImage, SkippedImages, read
from data.loader import Normalization, epoch_seed, without_a_small_last
from data.sources import DataSet, Preprocessing, Split
from utils import distributed
from utils.distributed import share
from utils.errors import UserError


def training_crop(size: int) -> v2.Transform:
    """A PIL image -> (3, size, size) uint8, a random part of it or its mirror image, as ImageNet's usual recipe."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def evaluation_crop(preprocessing: Preprocessing) -> v2.Transform:
    """A PIL image -> (3, S, S) uint8, its center."""
    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    resize = v2.Resize(preprocessing.resize[0], interpolation, antialias=preprocessing.antialias)  # of the shorter side
    return v2.Compose([resize, v2.CenterCrop(preprocessing.crop), v2.PILToTensor()])


class InOrder:
    """A batch sampler: each image is asked for by its index and a seed, which here nothing depends on."""

    def __init__(self, count: int, batch_size: int):
        self.num_images, self.batch_size = count, batch_size
        self.start = 0  # the batch to begin with

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in torch.arange(self.num_images).split(self.batch_size)[self.start :]:
            yield [(index, 0) for index in indices.tolist()]


class Shuffled(InOrder):
    """The images in an order, and each with a seed, that depend on (seed, epoch) alone.

    The seeds travel with the indices, for worker processes see no attribute that changes after they started.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        super().__init__(without_a_small_last(count, batch_size), batch_size)
        self.count, self.seed, self.epoch = count, seed, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)[: self.num_images]
        seeds = torch.randint(2**32, (self.count,), generator=generator)  # more bits than 32 would be ignored
        for indices in order.split(self.batch_size)[self.start :]:
            yield list(zip(indices.tolist(), seeds[indices].tolist(), strict=True))[share(len(indices))]


class Sample(NamedTuple):
    """An image of a split, (3, S, S) uint8; None if it cannot be read, for the reason given."""

    index: int
    image: Tensor | None
    target: int
    reason: str = ""


class ImageFiles(Dataset):
    """The images of a split, read and cropped, all chance drawn from the seed that comes with an index."""

    def __init__(self, split: Split, transform: v2.Transform):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, request: tuple[int, int]) -> Sample:
        index, seed = request
        target = int(self.split.targets[index])
        try:
            image = read(self.split.images[index])
        except DamagedImage as error:
            return Sample(index, None, target, str(error))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Sample(index, self.transform(image), target)


def collate(samples: list[Sample]) -> tuple[Any, Any, list[Sample]]:
    """((B, 3, S, S) uint8, (B,) targets) of the images that could be read, two empty lists if none; and the others."""
    good = [(sample.image, sample.target) for sample in samples if sample.image is not None]
    images, targets = default_collate(good) if good else ([], [])
    return images, targets, [sample for sample in samples if sample.image is None]


class StreamedBatches:
    """Normalized batches: (B, 3, S, S) float32 in channels_last, and (B,) targets; like data.loader.Batches.

    Images that cannot be read are left out, so that a batch may be smaller than the others, or missing. In training the
    processes of a run go through the batches in step; in evaluation each goes through its own.

    Args:
        order: which images, with which seeds, make a batch.
        transform: a PIL image -> (3, S, S) uint8.
        workers: processes that read images; 0: this process does. Those for training stay between epochs.
        skipped: takes the images that cannot be read.
        training: batches of which a process has fewer than two images are left out, for BatchNorm.

    Attributes:
        position: batches of the epoch done with so far: handed out, left out, or before the start.
    """

    def __init__(
        self,
        split: Split,
        order: InOrder,
        transform: v2.Transform,
        normalize: Normalization,
        workers: int,
        skipped: SkippedImages,
        training: bool = False,
    ):
        self.split, self.order, self.normalize = split, order, normalize
        self.skipped, self.training = skipped, training
        self.loader = DataLoader(
            ImageFiles(split, transform),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=normalize.device.type == "cuda",
            persistent_workers=training and workers > 0,
            generator=torch.Generator(),  # which it seeds workers from: the global one belongs to the networks
        )

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def num_images(self) -> int:
        """Of an epoch, before any is left out."""
        return self.order.num_images

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration draws its randomness for, and the batch (from 0) it starts with."""
        self.order.epoch, self.order.start = epoch, start
        self.position = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, start = self.normalize.device, self.order.start
        none_yet = start == 0
        if self.training:
            self.skipped.share()
        for position, (images, targets, damaged) in enumerate(self._loaded(), start=start + 1):
            self.position = position
            found = {self.split.images[sample.index]: sample.reason for sample in damaged}
            large_enough = len(targets) >= 1 + self.training
            if self.training:
                parts, sufficient = zip(*distributed.gathered((found, large_enough)), strict=True)
                found, large_enough = ChainMap(*parts), all(sufficient)
            self.skipped.add(found)
            if large_enough:
                none_yet = False
                yield self.normalize(images.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
        if none_yet and self.training:
            needed = 2 * distributed.world_size()
            raise UserError(f"there is no batch of {needed} images that can be read: repair them")

    def _loaded(self) -> Iterator[tuple[Any, Any, list[Sample]]]:
        """The batches as `collate` makes them."""
        iterator = None
        try:
            with _signals_blocked():
                iterator = iter(self.loader)
            _iterators.add(iterator)
            yield from iterator
        except OSError as error:  # a worker's is a text, whose last line is its error
            # The garbage collector may finalize their queues first, and they would never end.
            _end_workers(iterator or _unfinished_iterator(error))
            raise UserError(f"reading images fails: {str(error).splitlines()[-1]}") from error
        finally:
            if not self.loader.persistent_workers:
                _end_workers(iterator)


def stream(
    dataset: DataSet, train_batch_size: int, eval_batch_size: int, seed: int, device: torch.device, workers: int
) -> tuple[StreamedBatches, StreamedBatches, StreamedBatches]:
    """The batches to train on, to validate on and to test on."""
    common = (Normalization(dataset.mean, dataset.std, device), workers, dataset.skipped)
    order = Shuffled(len(dataset.train), train_batch_size, seed)
    train = StreamedBatches(dataset.train, order, training_crop(dataset.image_size), *common, training=True)
    center = evaluation_crop(dataset.preprocessing)
    shares = (split[share(len(split))] for split in (dataset.val, dataset.test))
    val, test = (StreamedBatches(split, InOrder(len(split), eval_batch_size), center, *common) for split in shares)
    return train, val, test


_iterators = weakref.WeakSet()  # of DataLoaders
_workers = weakref.WeakSet()  # their processes


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Workers that are started within do not get the signals that this process handles in Python.

    A terminal or a job scheduler signals all processes of a group. The workers would end with a traceback before this
    process is ready to end.
    """
    handled = {number for number in signal.valid_signals() if callable(signal.getsignal(number))}
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
    """Before multiprocessing sends SIGTERM, which workers may block, to those that are left, and waits for them."""
    try:
        for iterator in list(_iterators):
            _end_workers(iterator)
    finally:  # some are stuck, or their iterator is garbage, or could not start all of its workers
        for worker in list(_workers):
            worker.kill()
