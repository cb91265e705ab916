"""Batches from images in memory: crops, flips and normalization happen on the device, on whole batches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sources import DataSet, Split


class Batches:
    """Normalized batches of a split, in order: (B, 3, H, W) float32 in channels_last, and (B,) targets."""

    def __init__(
        self, split: Split, batch_size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
    ):
        self.images = torch.from_numpy(split.images).to(device)
        self.targets = torch.from_numpy(split.targets).to(device)
        self.batch_size = batch_size
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self._scale, self._bias = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]

    @property
    def num_images(self) -> int:
        return len(self.targets)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in zip(
            self.images.split(self.batch_size), self.targets.split(self.batch_size), strict=True
        ):
            yield self._normalize(images), targets

    def _normalize(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32."""
        return images.permute(0, 3, 1, 2).float().mul_(self._scale).add_(self._bias)


class AugmentedBatches(Batches):
    """Shuffled batches in which each image gets a random crop after zero padding and a random flip of its own.

    All randomness of an epoch is drawn at its start from (seed, epoch) alone, on the CPU: the same on every device,
    and on a run that was resumed. A last batch of a single image is left out, for BatchNorm cannot train on it.

    Args:
        padding: pixels on each side.
    """

    def __init__(self, *args, padding: int, flip: bool, seed: int):
        super().__init__(*args)
        self.height, self.width = self.images.shape[1:3]
        self.images = F.pad(self.images, (0, 0, padding, padding, padding, padding))
        self.padding, self.flip, self.seed = padding, flip, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws its randomness for."""
        self.epoch = epoch

    @property
    def num_images(self) -> int:
        count = len(self.targets)
        return count - 1 if count % self.batch_size == 1 else count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        count, device = len(self.targets), self.images.device
        order = torch.randperm(count, generator=generator)[: self.num_images]
        corner = torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand((count, 1), generator=generator) < (0.5 if self.flip else 0)
        rows, columns = torch.arange(self.height), torch.arange(self.width)
        rows = (corner[0] + rows).to(device)
        columns = (corner[1] + torch.where(mirrored, columns.flip(0), columns)).to(device)
        for chosen in order.to(device).split(self.batch_size):
            crops = self.images[chosen[:, None, None], rows[chosen, :, None], columns[chosen, None, :]]
            yield self._normalize(crops), self.targets[chosen]


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch of one run: different for every pair in practice (the factor is a prime)."""
    return seed * 1_000_003 + epoch


class Loaders(NamedTuple):
    train: AugmentedBatches
    val: Batches
    test: Batches


def make_loaders(
    dataset: DataSet, train_batch_size: int, eval_batch_size: int, seed: int, device: torch.device
) -> Loaders:
    """The batches of the three splits."""
    statistics = (dataset.mean, dataset.std, device)
    train = AugmentedBatches(
        dataset.train, train_batch_size, *statistics, padding=dataset.padding, flip=dataset.flip, seed=seed
    )
    val, test = (Batches(split, eval_batch_size, *statistics) for split in (dataset.val, dataset.test))
    return Loaders(train, val, test)
