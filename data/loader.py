"""Batches of images in memory: crops, flips and normalization happen on the device, on whole batches."""

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sources import Split
from utils.distributed import share, world_size


class Normalization:
    """(B, H, W, 3) uint8 images -> (B, 3, H, W) float32 on the device, in channels_last, of mean 0 and std 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.device = device
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self._scale, self._bias = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return images.to(torch.float32, memory_format=torch.channels_last).mul_(self._scale).add_(self._bias)


class Batches:
    """Normalized batches of a split in memory, in order: (B, 3, H, W) float32 in channels_last, and (B,) targets."""

    def __init__(
        self, split: Split, batch_size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
    ):
        self.images = torch.from_numpy(split.images).to(device)
        self.targets = torch.from_numpy(split.targets).to(device)
        self.batch_size, self.num_images = batch_size, len(self.targets)
        self.normalize = Normalization(mean, std, device)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = (values.split(self.batch_size) for values in (self.images, self.targets))
        for images, targets in zip(*parts, strict=True):
            yield self.normalize(images), targets


class AugmentedBatches(Batches):
    """Shuffled batches in which each image gets a random crop after zero padding and a random flip of its own.

    All random numbers of an epoch are drawn at its start, on the CPU, from (seed, epoch). They are the same on every
    device and in a resumed run. Each process gets its share of every batch. A last batch that is too small for all
    processes is dropped.

    Args:
        padding: pixels on each side.

    Attributes:
        position: batches of the epoch so far, including those before the start.
    """

    def __init__(self, *args, padding: int, flip: bool, seed: int):
        super().__init__(*args)
        self.num_images = without_a_small_last(self.num_images, self.batch_size)
        self.rows, self.columns = map(torch.arange, self.images.shape[1:3])
        self.images = F.pad(self.images, (0, 0, padding, padding, padding, padding))
        self.padding, self.flip, self.seed = padding, flip, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration, which seeds its random numbers, and the batch (from 0) to start with."""
        self.epoch, self.start = epoch, start
        self.position = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        count, device = len(self.targets), self.images.device
        order = torch.randperm(count, generator=generator)[: self.num_images]
        corner = torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand((count, 1), generator=generator) < (0.5 if self.flip else 0)
        rows = (corner[0] + self.rows).to(device)
        columns = (corner[1] + torch.where(mirrored, self.columns.flip(0), self.columns)).to(device)
        batches = order.to(device).split(self.batch_size)[self.start :]
        for position, chosen in enumerate(batches, start=self.start + 1):
            self.position = position
            chosen = chosen[share(len(chosen))]
            crops = self.images[chosen[:, None, None], rows[chosen, :, None], columns[chosen, None, :]]
            yield self.normalize(crops), self.targets[chosen]


class Waiting:
    """Yields batches and measures the time that passes until each of them is there."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]):
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.started = asked = time.perf_counter()
        for batch in self.batches:
            self.seconds += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    @property
    def share(self) -> str:
        """The percentage of the time since the start that was spent waiting: "12 %"."""
        return f"{100 * self.seconds / (time.perf_counter() - self.started):.0f} %"


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch of one run: different for every pair in practice (the factor is a prime)."""
    return seed * 1_000_003 + epoch


def without_a_small_last(count: int, batch_size: int) -> int:
    """`count` without a last batch that has fewer than two images for each process, which BatchNorm needs."""
    last = count % batch_size
    return count - last if last < 2 * world_size() else count
