"""CPU time of streaming photographs, compared with torchvision's pipelines and timm's: benchmark.py --streaming."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import decode_image
from torchvision.transforms import v2

import data
from data import make_loaders
from data.sources import DataSet

CPU = torch.device("cpu")
SIZE, RESIZED = 224, 256
BATCH = 100
Batch = tuple[Tensor, Tensor]  # (B, 3, S, S) float32, (B,) targets
Pipeline = Callable[[bool], Iterable[Batch]]  # training or evaluation -> one pass over the photographs


def compare(root: Path, images: int, rounds: int) -> Iterator[list[str]]:
    """Rows of a table: mode, pipeline, CPU time in us an image, and its ratio to ours.

    The time is that of one worker, from its start to its end, and of this process, with one thread; the median of
    `rounds` passes over the photographs in root/train, in turn.

    Args:
        images: photographs in a pass; those of the folder are repeated.
    """
    torch.set_num_threads(1)
    dataset = data.load("folder", root, 0, image_size=SIZE)
    repeated = np.resize(np.arange(len(dataset.train)), images)
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)])
    pipelines = {
        "ours": partial(ours, dataset, repeated),
        "torchvision references": partial(references, root / "train", repeated, normalize),
        "torchvision on uint8 tensors": partial(tensors, root / "train", repeated, normalize),
    }
    if find_spec("timm"):
        pipelines["timm, with prefetcher"] = partial(timms, root / "train", repeated)
    for mode in ("training", "evaluation"):
        calls = [partial(cpu_seconds, pipeline, mode == "training") for pipeline in pipelines.values()]
        rows = [[call() for call in calls] for _ in range(rounds)]
        times = dict(zip(pipelines, map(statistics.median, zip(*rows, strict=True)), strict=True))
        for name, seconds in times.items():
            yield [mode, name, f"{1e6 * seconds / images:,.0f}", f"{times['ours'] / seconds:.2f}"]


def cpu_seconds(pipeline: Pipeline, training: bool) -> float:
    """CPU time of a pass, of this process and its workers, which end with the pass."""
    before, workers_before = time.process_time(), sum(os.times()[2:4])
    for _ in pipeline(training):
        pass
    seconds = time.process_time() - before
    gc.collect()  # workers that persist end with their loader
    return seconds + sum(os.times()[2:4]) - workers_before


def ours(dataset: DataSet, repeated: np.ndarray, training: bool) -> Iterable[Batch]:
    split = dataset.train[repeated]
    loaders = make_loaders(replace(dataset, train=split, test=split), BATCH, BATCH, 0, CPU, workers=1)
    return loaders.train if training else loaders.test


def references(root: Path, repeated: np.ndarray, normalize: v2.Transform, training: bool) -> Iterable[Batch]:
    """As torchvision's references/classification: Pillow's images, normalized by the worker."""
    transform = v2.Compose([*geometry(training), v2.PILToTensor(), normalize])
    return loader(ImageFolder(root, transform), repeated)


def tensors(root: Path, repeated: np.ndarray, normalize: v2.Transform, training: bool) -> Iterator[Batch]:
    """uint8 tensors from the file on, normalized as batches by this process."""
    decode = partial(decode_image, mode="RGB")
    for images, targets in loader(ImageFolder(root, v2.Compose(geometry(training)), loader=decode), repeated):
        yield normalize(images), targets


def timms(root: Path, repeated: np.ndarray, training: bool) -> Iterable[Batch]:
    """timm's loader, with crops and flips alone: normalized as batches by this process."""
    from timm.data import ImageDataset, create_loader

    dataset = ImageDataset(str(root))
    dataset.reader.samples = [dataset.reader.samples[i] for i in repeated]
    options = {"interpolation": "bilinear", "color_jitter": None, "crop_pct": SIZE / RESIZED, "device": CPU}
    return create_loader(dataset, SIZE, BATCH, is_training=training, persistent_workers=False, **options)


def geometry(training: bool) -> list[v2.Transform]:
    if training:
        return [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
    return [v2.Resize(RESIZED), v2.CenterCrop(SIZE)]


def loader(dataset: ImageFolder, repeated: np.ndarray) -> DataLoader:
    dataset.samples = [dataset.samples[i] for i in repeated]
    return DataLoader(dataset, BATCH, num_workers=1)
