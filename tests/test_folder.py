"""Folders as data sets: which files are images of which split and class, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

import data
from data.folder import folder
from tests.helpers import make_tree


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
    for directory in list((root / "test").iterdir()):
        for path in list(directory.iterdir()):
            path.rename(root / "test" / f"{directory.name}{path.name}")
        directory.rmdir()


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
