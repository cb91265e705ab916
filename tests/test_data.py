"""Data sets, their parts, and the augmented batches of images in memory."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from data.loader import AugmentedBatches, Batches
from data.sources import Split, channel_statistics, stratified_split
from tests.helpers import ROOT, make_tree

CPU = torch.device("cpu")


def test_digits_are_all_there_and_split_without_overlap():
    dataset = data.load("digits", None, 0.1)
    splits = (dataset.train, dataset.val, dataset.test)
    assert sum(map(len, splits)) == 1797
    assert len(dataset.test) == 360
    assert len(dataset.val) == round(0.1 * 1437)
    assert dataset.input_size == (3, 8, 8)
    rows = [
        image.tobytes() + bytes([target])
        for split in splits
        for image, target in zip(split.images, split.targets, strict=True)
    ]
    assert len(set(rows)) == 1797  # no two of these images are alike, so an image in two splits would show
    assert all((split.images[..., 0] == split.images[..., 2]).all() for split in splits)


@pytest.mark.parametrize("size", [1, 10, 37, 99])
def test_stratified_split_keeps_proportions(size):
    targets = np.repeat([0, 1, 2], [10, 30, 60])
    drawn, rest = stratified_split(targets, size)
    assert sorted([*drawn, *rest]) == list(range(100))
    assert len(drawn) == size
    for label, share in enumerate([0.1, 0.3, 0.6]):
        assert abs((targets[drawn] == label).sum() - share * size) <= 1
    assert list(drawn) == list(stratified_split(targets, size)[0])
    assert size == 1 or list(drawn) != list(stratified_split(targets, size, seed=1)[0])


def test_validation_split_by_count_fraction_and_none():
    assert len(data.load("digits", None, 300).val) == 300
    assert len(data.load("digits", None, 0.25).val) == 359
    chosen_on_test = data.load("digits", None, 0)
    assert chosen_on_test.val is chosen_on_test.test
    assert len(chosen_on_test.train) == 1437
    with pytest.raises(ValueError, match="nothing to train on"):
        data.load("digits", None, 1437)


def test_channel_statistics():
    images = np.random.default_rng(0).integers(0, 256, (2300, 4, 3, 3), np.uint8)
    images[..., 2] = 51
    mean, std = channel_statistics(images)
    pixels = images.reshape(-1, 3) / 255
    assert mean == pytest.approx(pixels.mean(0), abs=1e-4)
    assert std[:2] == pytest.approx(pixels[:, :2].std(0), abs=1e-4)
    assert std[2] == pytest.approx(1 / 255, abs=1e-4)  # a constant channel must not divide by zero


@pytest.mark.parametrize(("train_size", "expected"), [(100, 100), (0.5, 646), (None, 1293)])
def test_a_part_of_the_training_set_validates_on_the_same_images(train_size, expected):
    whole, part = data.load("digits", None, 0.1), data.load("digits", None, 0.1, train_size=train_size)
    assert len(part.train) == expected
    assert (part.val.images == whole.val.images).all()
    known = {image.tobytes() for image in whole.train.images}
    assert len({image.tobytes() for image in part.train.images} & known) == expected
    counts = np.bincount(part.train.targets) / np.bincount(whole.train.targets)
    assert counts.max() - counts.min() < 2 / np.bincount(whole.train.targets).min()
    assert (part.mean, part.std) == (whole.mean, whole.std)


def test_unknown_data_set():
    with pytest.raises(ValueError, match="digits, cifar10, cifar100, fashion_mnist, svhn, imagenet, folder"):
        data.load("mnist", None, 0.1)


# --- batches


def split_of(count, height=6, width=5):
    generator = np.random.default_rng(0)
    return Split(generator.integers(1, 256, (count, height, width, 3), np.uint8), np.arange(count))


def test_batches_normalize_and_keep_the_order():
    split, mean, std = split_of(10), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    batches = list(Batches(split, 4, mean, std, CPU))
    assert [len(targets) for _, targets in batches] == [4, 4, 2]
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = (split.images / 255 - mean) / std
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6)
    assert targets.tolist() == list(range(10))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def augmented(split, batch_size=4, padding=2, flip=True, seed=0):
    return AugmentedBatches(split, batch_size, (0, 0, 0), (1 / 255,) * 3, CPU, padding=padding, flip=flip, seed=seed)


def placements(original, crop, padding, flip):
    """Every (row, column, mirrored) at which `crop` stands in the zero-padded original, (H, W, 3)."""
    height, width = original.shape[:2]
    padded = np.pad(original, ((padding, padding), (padding, padding), (0, 0)))
    found = set()
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            window = padded[row : row + height, column : column + width]
            for mirrored in {False, flip}:
                if np.array_equal(crop, window[:, ::-1] if mirrored else window):
                    found.add((row, column, mirrored))
    return found


def test_each_image_gets_a_crop_and_a_flip_of_its_own():
    split = split_of(200)
    batches = augmented(split, batch_size=50)
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert sorted(targets.tolist()) == list(range(200))
    assert targets.tolist() != list(range(200))
    chosen = []
    for image, target in zip(images.permute(0, 2, 3, 1).round().byte().numpy(), targets, strict=True):
        found = placements(split.images[target], image, padding=2, flip=True)
        assert len(found) == 1
        chosen += found
    rows, columns, mirrored = zip(*chosen, strict=True)
    assert len(set(chosen[:50])) > 20  # different within one batch
    for offsets in (rows, columns):
        assert all(25 <= offsets.count(offset) <= 60 for offset in range(5))  # uniform: 40 each expected
    assert 75 <= sum(mirrored) <= 125


def test_no_flip_and_no_padding_leave_images_as_they_are():
    split = split_of(9)
    for images, targets in augmented(split, padding=0, flip=False):
        assert np.array_equal(images.permute(0, 2, 3, 1).round().byte().numpy(), split.images[targets])


def epoch_of(batches, epoch):
    batches.set_epoch(epoch)
    return torch.cat([images for images, _ in batches])


def test_augmentation_depends_on_seed_and_epoch_alone():
    split = split_of(20)
    first = epoch_of(augmented(split), 3)
    assert torch.equal(first, epoch_of(augmented(split), 3))
    assert not torch.equal(first, epoch_of(augmented(split), 4))
    assert not torch.equal(first, epoch_of(augmented(split, seed=1), 3))


def test_epoch_can_begin_in_its_middle():
    batches = augmented(split_of(22), 4)
    batches.set_epoch(3)
    whole = list(batches)
    for start in range(len(whole) + 1):
        batches.set_epoch(3, start)
        positions = []
        for (images, targets), expected in zip(batches, whole[start:], strict=True):
            assert torch.equal(images, expected[0])
            assert torch.equal(targets, expected[1])
            positions.append(batches.position)
        assert positions == list(range(start + 1, len(whole) + 1))
    batches.set_epoch(4)
    assert len(list(batches)) == len(whole)


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 8, [3])])
def test_last_batch_is_kept_unless_it_is_a_single_image(count, batch_size, sizes):
    batches = augmented(split_of(count), batch_size)
    assert [len(targets) for _, targets in batches] == sizes
    assert len(batches) == len(sizes)
    assert batches.num_images == sum(sizes)


def test_images_in_memory_are_known_by_their_pixels_and_targets():
    dataset = data.load("digits", None, 0.1)
    known = dataset.fingerprints(None)
    assert data.load("digits", None, 0.1).fingerprints(None) == known
    pixels, targets = dataset.val.images.copy(), dataset.val.targets.copy()
    pixels[3, 2, 2, 0] ^= 1
    targets[3] ^= 1
    for changed in (Split(pixels, dataset.val.targets), Split(dataset.val.images, targets)):
        now = replace(dataset, val=changed).fingerprints(None)
        assert {name for name in known if now[name] != known[name]} == {"val"}


def test_streamed_images_are_known_by_their_paths_wherever_the_folder_is(tmp_path):
    make_tree(tmp_path / "set")

    def known(folder):
        return data.load("folder", folder, 0.5, image_size=32).fingerprints(folder)

    before = known(tmp_path / "set")
    (tmp_path / "set").rename(tmp_path / "moved")
    assert known(tmp_path / "moved") == before
    (tmp_path / "moved" / "test" / "cat" / "0.png").rename(tmp_path / "moved" / "test" / "cat" / "a.png")
    after = known(tmp_path / "moved")
    assert {name for name in after if after[name] != before[name]} == {"test"}


def test_training_images_in_validation_and_test_are_counted(tmp_path):
    make_tree(tmp_path / "set", splits=("train", "val", "test"), count=3)
    for source, *copies in (("cat/0", "val/dog/9", "test/cat/7", "test/cat/8"), ("cat/1", "train/dog/9", "test/dog/9")):
        for copy in copies:  # also twice in a split, and under another class
            shutil.copy(tmp_path / "set" / "train" / f"{source}.png", tmp_path / "set" / f"{copy}.png")
    assert data.load("folder", tmp_path / "set", 0.5).repeated == {"validation": 1, "test": 3}
    assert data.load("folder", tmp_path / "set", 0).repeated == {"test": 3}
    assert data.load("folder", tmp_path / "set", 0, image_size=32).repeated == {}  # streamed: not in memory


IN_MEMORY = """
import sys
from pathlib import Path
import torch
import data

for name, data_dir in (("digits", None), ("folder", Path(sys.argv[1]))):
    loaders = data.make_loaders(data.load(name, data_dir, 0.2), 4, 4, 0, torch.device("cpu"), workers=1)
    assert len(next(iter(loaders.train))[1]) == 4
assert "torchvision" not in sys.modules
"""


def test_images_in_memory_need_no_torchvision(tmp_path):
    """Importing it takes a second."""
    make_tree(tmp_path / "set")
    subprocess.run([sys.executable, "-c", IN_MEMORY, str(tmp_path / "set")], cwd=ROOT, check=True, timeout=300)
