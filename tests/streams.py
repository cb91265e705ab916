"""What the tests of streaming need: files of many sizes, and batches of them."""

import numpy as np
import torch
from PIL import Image

from data.crops import EvaluationCrop, TrainingCrop
from data.images import SkippedImages
from data.loader import Normalization
from data.sources import Preprocessing, Split
from data.streaming import StreamedBatches

SIZE = 32


def stream_tree(root, count=6, splits=("train", "test"), classes=("cat", "dog")):
    """Images of many sizes, PNG and JPEG, gray and in color; returns their paths as `folder` orders them."""
    generator, paths = np.random.default_rng(0), []
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(20, 90, 2)
                pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
                image = Image.fromarray(pixels[..., 0] if i % 3 == 1 else pixels)
                paths.append(root / split / name / f"{i:03}.{'jpg' if i % 2 else 'png'}")
                image.save(paths[-1])
    return paths


def streamed(paths, training=True, batch_size=4, workers=0, seed=0, total=10_000):
    """Batches of these files, in which image i is of class i."""
    split = Split(np.array([str(path).encode() for path in paths]), np.arange(len(paths)))
    crop = TrainingCrop(SIZE) if training else EvaluationCrop(Preprocessing((37, 37), (SIZE, SIZE)))
    normalize = Normalization((0, 0, 0), (1 / 255,) * 3, torch.device("cpu"))
    return StreamedBatches(
        split, batch_size, crop, normalize, workers, SkippedImages(total), seed if training else None
    )


def epoch_of(batches, epoch=1):
    """{class: image} and the classes in their order."""
    batches.set_epoch(epoch)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return dict(zip(targets.tolist(), images, strict=True)), targets.tolist()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
