"""Data sets, the validation split, folders of small images, and augmentation."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data.folder import folder
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


# --- folders of images


def test_folder_reads_every_image_and_its_class(tmp_path):
    written = make_tree(tmp_path / "set", classes=("dog", "cat", "eel"))
    source = folder(tmp_path / "set", workers=2)
    assert source.classes == ["cat", "dog", "eel"]
    for split, name in ((source.train, "train"), (source.test, "test")):
        assert split.images.shape == (18, 8, 10, 3)
        assert split.targets.tolist() == sorted([0, 1, 2] * 6)
        expected = np.concatenate([written[name, class_name] for class_name in source.classes])
        assert np.array_equal(split.images, expected)


def test_hidden_files_and_folders_are_no_images(tmp_path):
    make_tree(tmp_path / "set")
    cat = tmp_path / "set" / "train" / "cat"
    for hidden in (".ipynb_checkpoints", "@eaDir", "dog/.@__thumb", "dog/@__thumb", "../.cache", "../@Recycle"):
        shutil.copytree(cat, cat.parent / hidden)
    (cat / "._0.png").write_bytes(b"of macOS")
    dataset = folder(tmp_path / "set", 1)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.train.targets.tolist() == [0] * 6 + [1] * 6
    assert dataset.remarks == []


def test_folders_in_a_class_and_links_to_folders_are_followed_once(tmp_path):
    make_tree(tmp_path / "set")
    train, elsewhere = tmp_path / "set" / "train", tmp_path / "elsewhere"
    shutil.copytree(train / "cat", elsewhere / "deep" / "er")
    shutil.copytree(train / "cat", train / "dog" / "more")
    (train / "dog" / "linked").symlink_to(elsewhere)
    (train / "eel").symlink_to(elsewhere)
    for loop, target in (
        ("cat/loop", "."),
        ("cat/up", "../.."),
        ("dog/more/cat", "../../../../set"),
        ("dog/a", "more"),
    ):
        (train / loop).symlink_to(target)
    (elsewhere / "deep" / "back").symlink_to(elsewhere)
    dataset = folder(tmp_path / "set", 1)
    assert dataset.train.targets.tolist() == [0] * 6 + [1] * 18 + [2] * 6
    assert dataset.remarks == []


def test_files_that_are_not_used_are_counted_and_named(tmp_path):
    make_tree(tmp_path / "set", splits=("train", "test", "annotations", "masks"))
    train = tmp_path / "set" / "train"
    for name in ("cat/a.txt", "cat/deep/b.TXT", "dog/c", "d.csv"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).touch()
    (train / "dog" / "gone").symlink_to("nowhere")
    (train / "dog" / "self").symlink_to("self")
    shutil.copy(train / "cat" / "0.png", train / "loose.png")
    dataset = folder(tmp_path / "set", 1)
    assert len(dataset.train) == 12
    unused, others, loose = dataset.remarks
    assert unused == f"Not used: the folder(s) annotations, masks beside train in {tmp_path / 'set'}."
    assert "6 files that Pillow does not read as images (3 no extension, 2 .txt, 1 .csv), such as" in others
    assert f"1 images beside the class folders, such as {train / 'loose.png'}" in loose
    assert data.load("folder", tmp_path / "set", 0).doubts()[:3] == dataset.remarks


@pytest.mark.parametrize("extension", ["jfif", "jpe", "JPG", "gif", "tga", "jp2", "webp", "apng"])
def test_images_of_other_extensions_are_read(tmp_path, extension):
    make_tree(tmp_path / "set")
    (tmp_path / "set" / "train" / "cat" / "0.png").unlink()
    Image.new("RGB", (10, 8), (255, 0, 0)).convert("P" if extension == "gif" else "RGB").save(
        tmp_path / "set" / "train" / "cat" / f"a.{extension}", "JPEG" if extension in ("jfif", "jpe") else None
    )
    dataset = folder(tmp_path / "set", 1)
    np.testing.assert_allclose(dataset.train.images[5].astype(int), np.full((8, 10, 3), (255, 0, 0)), atol=5)
    assert dataset.remarks == []


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_val(tmp_path, name):
    make_tree(tmp_path / "set", splits=("train", name, "test"), count=3)
    assert len(folder(tmp_path / "set", 1).val) == 6
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "val")
    with pytest.raises(ValueError, match=rf"has val and {name}, which both mean val: rename or move one"):
        folder(tmp_path / "set", 1)


@pytest.mark.parametrize("image_size", [None, 32])
def test_training_images_that_are_all_alike_are_reported(tmp_path, image_size):
    make_tree(tmp_path / "set")
    for path in (tmp_path / "set" / "train").rglob("*.png"):
        Image.new("RGBA", (10, 8), (0, 0, 0, int(path.stem))).save(path)
    assert folder(tmp_path / "set", 1, image_size).remarks == []  # transparency differs
    for path in (tmp_path / "set" / "train").rglob("*.png"):
        Image.new("RGB", (10, 8)).save(path)
    assert (
        "12 training images were compared, and all of them are alike"
        in folder(tmp_path / "set", 1, image_size).remarks[0]
    )


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


def test_folder_with_val_for_test_and_with_both(tmp_path):
    make_tree(tmp_path / "a", splits=("train", "val"))
    assert folder(tmp_path / "a", 1).val is None
    written = make_tree(tmp_path / "b", splits=("train", "val", "test"))
    dataset = data.load("folder", tmp_path / "b", 0.5)
    assert np.array_equal(dataset.val.images[:6], written["val", "cat"])
    assert np.array_equal(dataset.test.images[:6], written["test", "cat"])
    assert len(dataset.train) == 12


def contents(root):
    return {path: path.is_file() and path.read_bytes() for path in root.rglob("*")}


@pytest.mark.parametrize("content", [b"PK", b"not an archive"])
def test_images_are_decoded_at_every_start_and_nothing_is_written(tmp_path, content):
    """Files beside the folder, such as caches of earlier versions, are neither read nor changed."""
    root = tmp_path / "set"
    make_tree(root)
    (tmp_path / "set.cache.npz").write_bytes(content)
    before = contents(tmp_path)
    first = folder(root, 2)
    assert contents(tmp_path) == before
    changed = np.full((8, 10, 3), 7, np.uint8)
    Image.fromarray(changed).save(root / "train" / "cat" / "1.png")
    again = folder(root, 2)
    assert np.array_equal(again.train.images[1], changed)
    assert np.array_equal(np.delete(again.train.images, 1, 0), np.delete(first.train.images, 1, 0))


def test_damaged_images_are_skipped_and_reported(tmp_path, capsys):
    """Two of 240 small images, of which the first one has no size to compare the others with."""
    written = make_tree(tmp_path / "set", count=60)
    damaged = [tmp_path / "set" / "train" / name / "0.png" for name in ("cat", "dog")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-30])
    source = folder(tmp_path / "set", workers=2)
    assert len(source.test) == 120
    assert source.train.targets.tolist() == [0] * 59 + [1] * 59
    names = sorted(map(str, range(60)))  # 0, 1, 10, 11, ...: the order of the files
    kept = [int(name) for name in names[1:]]
    expected = np.concatenate([written["train", name][kept] for name in ("cat", "dog")])
    assert np.array_equal(source.train.images, expected)
    assert list(source.skipped.reasons) == list(map(str, damaged))
    output = capsys.readouterr().out
    assert [output.count(f"skipping {path}") for path in damaged] == [1, 1]


def test_a_split_of_damaged_images_alone_is_refused(tmp_path):
    make_tree(tmp_path / "set", splits=("train",), count=60)
    (tmp_path / "set" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "test" / "cat" / "0.png").touch()
    with pytest.raises(ValueError, match=r"none of the images in .*test can be read"):
        folder(tmp_path / "set", 1)


def remove_images(root):
    for image in (root / "train").rglob("*.png"):
        image.unlink()


def empty_test(root):
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    (root / "train" / "dog" / "3.png").rename(root / "train" / "3.png")


def flatten_test(root):
    for path in (root / "test").rglob("*.png"):
        path.rename(root / "test" / f"{path.parent.name}{path.name}")
    for path in (root / "test").glob("*/"):
        path.rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_images, "no images in .*train"),
        (lambda root: (root / "test" / "dog" / "3.png").write_bytes(b"no image"), r"1 of the 24 images .*dog/3\.png"),
        (lambda root: (root / "train").rename(root / "training"), "no folder train, only test, training: expected"),
        (
            lambda root: [p.rename(p.with_suffix(".heic")) for p in (root / "train" / "dog").iterdir()],
            r"train/dog has no images that Pillow reads, only files such as .*/dog/0\.heic",
        ),
        (flatten_test, r"test has images, but no class folders: move each image into .*test/<class>/.*--labels"),
        (empty_test, "no images in .*test: expected"),
        (lambda root: (root / "test").rename(root / "testing"), "neither test nor val"),
        (lambda root: (root / "train" / "dog").rename(root / "dog"), "holds 1 class"),
        (lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()], "no images in .*dog"),
        (lambda root: (root / "train" / "dog" / "z.png").symlink_to("nothing"), r"1 of the 25 images .*z\.png"),
        (lambda root: (root / "test" / "dog").rename(root / "test" / "fox"), "class that train does not have: fox"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, spoil, message):
    make_tree(tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        folder(tmp_path / "set", 2)


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
