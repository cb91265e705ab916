"""CIFAR, Fashion-MNIST, SVHN and ImageNet from files laid out as the original ones, whole, damaged and missing."""

import gzip
import hashlib
import io
import pickle
import sys
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import data
from experiment import classify
from tests.helpers import make_tree
from utils.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize(
    ("name", "folder_name", "files", "labels", "meta"),
    [
        ("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "labels", "batches.meta"),
        ("cifar100", "cifar-100-python", ["train"], "fine_labels", "meta"),
    ],
)
def test_cifar_is_read_from_its_own_files(tmp_path, monkeypatch, name, folder_name, files, labels, meta):
    """Only their checksums cannot be imitated."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    generator = np.random.default_rng(0)
    root, written = tmp_path / folder_name, {}
    root.mkdir()
    test_file = "test_batch" if name == "cifar10" else "test"
    for file in (*files, test_file):
        pixels = generator.integers(0, 256, (20, 3, 32, 32), np.uint8)
        written[file] = pixels.transpose(0, 2, 3, 1)
        content = {"data": pixels.reshape(20, -1), labels: [i % 10 for i in range(20)]}
        (root / file).write_bytes(pickle.dumps(content))
    key = "label_names" if name == "cifar10" else "fine_label_names"
    (root / meta).write_bytes(pickle.dumps({key: list("abcdefghij")}))

    dataset, whole = data.load(name, tmp_path, 0.2), data.load(name, tmp_path, 0)
    assert dataset.classes == list("abcdefghij")
    assert dataset.input_size == (3, 32, 32)
    assert np.array_equal(whole.train.images, np.concatenate([written[file] for file in files]))
    assert np.array_equal(dataset.test.images, written[test_file])
    assert dataset.test.targets.tolist() == [i % 10 for i in range(20)]
    assert (dataset.padding, dataset.flip) == (4, True)
    if name == "cifar10":
        assert (dataset.mean, dataset.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def idx(array):
    """A uint8 array in the format of MNIST's files."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_fashion_mnist(root, counts=(50, 20)):
    """Returns {"train" or "t10k": images (n, 28, 28)}; the label of image i is i % 10."""
    generator, raw, written = np.random.default_rng(0), root / "FashionMNIST" / "raw", {}
    raw.mkdir(parents=True)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        written[split] = generator.integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(written[split]))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return written


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_is_read_from_its_own_files(tmp_path, monkeypatch, compressed):
    written = write_fashion_mnist(tmp_path)
    if compressed:  # as downloaded, not yet unpacked
        checksums = []
        for file in list((tmp_path / "FashionMNIST" / "raw").iterdir()):
            packed = gzip.compress(file.read_bytes())
            file.with_name(f"{file.name}.gz").write_bytes(packed)
            checksums.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
            file.unlink()
        monkeypatch.setattr(datasets.FashionMNIST, "resources", checksums)
    dataset = data.load("fashion_mnist", tmp_path, 0)
    assert dataset.classes[9] == "Ankle boot"
    assert (dataset.input_size, dataset.padding, dataset.flip) == ((3, 32, 32), 4, True)
    for split, images in ((dataset.train, written["train"]), (dataset.test, written["t10k"])):
        expected = np.zeros((len(images), 32, 32, 3), np.uint8)
        expected[:, 2:30, 2:30] = images[..., None]
        assert np.array_equal(split.images, expected)
        assert split.targets.tolist() == [i % 10 for i in range(len(images))]
    pixels = np.pad(written["train"], ((0, 0), (2, 2), (2, 2))) / 255
    assert dataset.mean == pytest.approx([pixels.mean()] * 3, abs=1e-4)
    assert dataset.std == pytest.approx([pixels.std()] * 3, abs=1e-4)
    for pixels in (written["t10k"][0], dataset.test.images[0]):  # an image file gets the border, unless it has it
        prepared = classify.prepare(Image.fromarray(pixels).convert("RGB"), asdict(dataset.preprocessing))
        assert np.array_equal((prepared * 255).round().transpose(1, 2, 0), dataset.test.images[0])


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: cut(raw / "train-images-idx3-ubyte", 1000),
        lambda raw: cut(raw / "t10k-images-idx3-ubyte", 0),
        lambda raw: cut(raw / "train-labels-idx1-ubyte", -1),
        lambda raw: (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(19, np.uint8))),
        lambda raw: (raw / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28), np.uint8))),
        lambda raw: (raw / "train-images-idx3-ubyte").unlink(),
    ],
)
def test_damaged_fashion_mnist_is_refused(tmp_path, damage):
    write_fashion_mnist(tmp_path)
    damage(tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(UserError, match=r"FashionMNIST is damaged or not complete \(.*\): delete it") as error:
        data.load("fashion_mnist", tmp_path, 0.1)
    assert len(str(error.value).splitlines()) == 1


def write_svhn(root, monkeypatch):
    """Returns {split: images (n, 32, 32, 3)}; the label of image i is i % 10, and 10 in place of 0 in the files."""
    generator, written, checksums = np.random.default_rng(0), {}, {}
    for split, count in (("train", 40), ("test", 20)):
        written[split] = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = np.arange(count) % 10
        file = root / f"{split}_32x32.mat"
        labels = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(file, {"X": written[split].transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        checksums[split] = [f"http://nowhere/{file.name}", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", checksums)
    return written


def test_svhn_is_read_from_its_own_files(tmp_path, monkeypatch):
    written = write_svhn(tmp_path, monkeypatch)
    dataset = data.load("svhn", tmp_path, 0)
    assert dataset.classes == list("0123456789")
    assert (dataset.input_size, dataset.padding, dataset.flip) == ((3, 32, 32), 4, False)
    assert np.array_equal(dataset.train.images, written["train"])
    assert np.array_equal(dataset.test.images, written["test"])
    assert dataset.test.targets.tolist() == [i % 10 for i in range(20)]
    assert dataset.mean == pytest.approx(written["train"].mean((0, 1, 2)) / 255, abs=1e-4)


def test_damaged_svhn_is_refused(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    cut(tmp_path / "test_32x32.mat", 1000)
    with pytest.raises(UserError, match=r"test_32x32\.mat is damaged or not complete .*: delete it"):
        data.load("svhn", tmp_path, 0.1)


def test_svhn_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "scipy.io")
    with pytest.raises(UserError, match=r"svhn comes in MATLAB files.*pip install scipy"):
        data.load("svhn", tmp_path, 0.1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "svhn"])
def test_what_is_missing_and_cannot_be_downloaded(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is not in .* could not be downloaded .*--dataset digits") as error:
        data.load(name, tmp_path, 0.1)
    assert len(str(error.value).splitlines()) == 1


def test_damaged_cifar_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut off")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"cut off, too")
    with pytest.raises(UserError, match=r"cifar-10-batches-py is damaged or not complete .*: delete it"):
        data.load("cifar10", tmp_path, 0.1)


# --- ImageNet

WNIDS = ("n01440764", "n01443537")


def test_imagenet_is_a_tree_with_val_as_the_test_set(tmp_path):
    make_tree(tmp_path, splits=("train", "val"), classes=WNIDS, count=10)
    (tmp_path / "test").mkdir()  # Kaggle's has images without labels there
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    dataset = data.load("imagenet", tmp_path, 0.1)
    assert dataset.classes == list(WNIDS)
    assert dataset.input_size == (3, 224, 224)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [18, 2, 20]
    assert all(b"/val/" in path for path in dataset.test.images)
    assert data.load("imagenet", tmp_path, 0.1, image_size=64).input_size == (3, 64, 64)


def pack(path, members, mode="w"):
    """Write a tar file of {name: content}; returns its path."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def write_imagenet_archives(root, monkeypatch):
    """Two classes of three training images; four validation images, of the second, first, first, second class."""
    inner = {}
    for wnid in WNIDS:
        inner[f"{wnid}.tar"] = pack(root / "inner", {f"{wnid}_{i}.JPEG": jpeg() for i in range(3)}).read_bytes()
    (root / "inner").unlink()
    synsets = np.array(
        [(i + 1, wnid, f"name {i}", "gloss", 0) for i, wnid in enumerate(WNIDS)],
        dtype=[("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("gloss", object), ("num_children", int)],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    devkit = "ILSVRC2012_devkit_t12/data"
    labels = {
        f"{devkit}/meta.mat": meta.getvalue(),
        f"{devkit}/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n1\n2\n",
    }
    archives = {
        "train": pack(root / "ILSVRC2012_img_train.tar", inner),
        "val": pack(root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{i:08}.JPEG": jpeg() for i in range(1, 5)}),
        "devkit": pack(root / "ILSVRC2012_devkit_t12.tar.gz", labels, "w:gz"),
    }
    checksums = {name: (path.name, hashlib.md5(path.read_bytes()).hexdigest()) for name, path in archives.items()}
    monkeypatch.setattr("torchvision.datasets.imagenet.ARCHIVE_META", checksums)


def test_imagenet_s_archives_are_unpacked(tmp_path, monkeypatch):
    write_imagenet_archives(tmp_path, monkeypatch)
    dataset = data.load("imagenet", tmp_path, 0)
    assert dataset.classes == list(WNIDS)
    assert dataset.train.targets.tolist() == [0] * 3 + [1] * 3
    names = [path.decode().split("/")[-2:] for path in dataset.test.images]
    expected = [(0, 2), (0, 3), (1, 1), (1, 4)]
    assert names == [[WNIDS[target], f"ILSVRC2012_val_{i:08}.JPEG"] for target, i in expected]


@pytest.mark.parametrize("kept", [True, False])
def test_images_of_imagenet_in_no_class_folder(tmp_path, monkeypatch, kept):
    """Nothing is to be deleted, and it is unpacked again only from an archive that is there."""
    write_imagenet_archives(tmp_path, monkeypatch)
    data.load("imagenet", tmp_path, 0)
    (tmp_path / "val" / "ILSVRC2012_val_00000004.JPEG").touch()
    advice = "rename .*/val and run again, which unpacks ILSVRC2012_img_val.tar again"
    if not kept:
        (tmp_path / "ILSVRC2012_img_val.tar").unlink()
        advice = "move each into the folder of its class, val/<wnid>; ILSVRC2012_validation_ground_truth"
    with pytest.raises(UserError, match=f"1 images in no class folder, such as .*00000004.JPEG: {advice}") as error:
        data.load("imagenet", tmp_path, 0)
    assert "delete" not in str(error.value)


def test_inner_archives_of_imagenet_may_stay_beside_complete_classes(tmp_path):
    make_tree(tmp_path, splits=("train", "val"), classes=WNIDS, count=10)
    folder, archive = tmp_path / "train" / WNIDS[1], tmp_path / "train" / f"{WNIDS[1]}.tar"
    pack(archive, {path.name: path.read_bytes() for path in folder.iterdir()})
    dataset = data.load("imagenet", tmp_path, 0)
    assert len(dataset.train) == 20
    assert "1 .tar" in dataset.remarks[0]
    (folder / "9.png").write_bytes((folder / "9.png").read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{WNIDS[1]}\.tar is not unpacked completely: mkdir -p .* tar -xf .* or move"):
        data.load("imagenet", tmp_path, 0)


@pytest.mark.parametrize("archive", ["train", "val"])
def test_damaged_archives_of_imagenet_are_refused(tmp_path, monkeypatch, archive):
    write_imagenet_archives(tmp_path, monkeypatch)
    cut(tmp_path / f"ILSVRC2012_img_{archive}.tar", 3000)
    with pytest.raises(UserError, match=f"cannot be unpacked: .*ILSVRC2012_img_{archive}.tar .* corrupted") as error:
        data.load("imagenet", tmp_path, 0)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / archive).exists()
