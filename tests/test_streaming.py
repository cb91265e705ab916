"""Images that stream from their files: which do, their crops, damaged files, and whole runs."""

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import nn

import data
from data import make_loaders
from data.folder import folder
from model.online import Students
from tests.helpers import fail, make_tree, report_of, succeed
from tests.streams import SIZE, epoch_of, same, stream_tree, streamed
from tests.test_images import bomb
from utils import options
from utils.device import Execution
from utils.engine import Trainer
from utils.errors import UserError
from utils.job import Job
from utils.metrics import evaluate

CPU = torch.device("cpu")


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-2000])


DAMAGES = [bomb, truncated, lambda path: path.touch(), lambda path: path.write_bytes(b"text"), lambda path: None]


# --- decisions


@pytest.mark.parametrize(
    ("size", "other", "image_size", "expected"),
    [
        ((64, 48), None, None, None),
        ((65, 48), None, None, 224),
        ((64, 48), (48, 64), None, 224),
        ((64, 48), None, 32, 32),
        ((64, 48), (48, 64), 32, 32),
    ],
)
def test_what_streams_and_what_stays_in_memory(tmp_path, size, other, image_size, expected):
    make_tree(tmp_path / "set", size=size)
    if other:
        Image.new("RGB", other).save(tmp_path / "set" / "test" / "dog" / "9.png")
    source = folder(tmp_path / "set", 1, image_size)
    assert source.image_size == expected
    assert source.input_size == ((3, expected, expected) if expected else (3, 48, 64))
    if expected:
        assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_photographs_are_hardly_looked_at_before_they_stream(tmp_path, monkeypatch):
    """The headers of some, and the pixels of two."""
    make_tree(tmp_path / "set", count=30, size=(65, 65))
    opened, loaded = [], []
    original, load = Image.open, PngImageFile.load
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), original(path))[1])
    monkeypatch.setattr(PngImageFile, "load", lambda image: (loaded.append(image.filename), load(image))[1])
    assert folder(tmp_path / "set", 1).image_size == 224
    assert len(opened) == 18
    assert len(set(loaded)) == 2


@pytest.mark.parametrize("odd", ["train/cat/0.png", "test/dog/5.png"])  # also the first of all
def test_an_image_of_another_size_than_the_other_small_ones_is_named(tmp_path, odd):
    make_tree(tmp_path / "set")
    Image.new("RGB", (500, 300)).save(tmp_path / "set" / odd)
    dataset = folder(tmp_path / "set", 1)
    assert dataset.image_size == 224
    (remark,) = dataset.remarks
    assert f"{odd} has 500 x 300 pixels, others have 10 x 8" in remark


def test_validation_split_of_files(tmp_path):
    paths = stream_tree(tmp_path / "set", count=10)
    dataset = data.load("folder", tmp_path / "set", 0.2, image_size=SIZE)
    assert [list(np.bincount(split.targets)) for split in (dataset.train, dataset.val)] == [[8, 8], [2, 2]]
    files = [path.decode() for split in (dataset.train, dataset.val) for path in split.images]
    assert sorted(files) == sorted(map(str, paths[:20]))
    assert dataset.test.images.tolist() == [str(path).encode() for path in paths[20:]]
    assert (
        data.load("folder", tmp_path / "set", 0.2, image_size=SIZE).val.images.tolist() == dataset.val.images.tolist()
    )
    unsplit = data.load("folder", tmp_path / "set", 0, image_size=SIZE)
    assert unsplit.val is unsplit.test


# --- batches


def test_evaluation_is_the_center_of_the_resized_image(tmp_path):
    paths = stream_tree(tmp_path / "set")
    dataset = data.load("folder", tmp_path / "set", 0, image_size=SIZE)
    test = make_loaders(dataset, 4, 5, 0, CPU, workers=1).test
    batches = list(test)
    assert [len(targets) for _, targets in batches] == [5, 5, 2]
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 6 + [1] * 6
    for path, image in zip(paths[12:], torch.cat([images for images, _ in batches]), strict=True):
        original = Image.open(path).convert("RGB")
        shorter = min(original.size)
        resized = original.resize([37 * side // shorter for side in original.size], Image.Resampling.BILINEAR)
        left, top = (round((side - SIZE) / 2) for side in resized.size)
        pixels = np.asarray(resized)[top : top + SIZE, left : left + SIZE] / 255
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1.01 / 255 / 0.224)  # the filters differ by 1


def test_training_crops_are_parts_of_the_image_and_of_its_mirror_image(tmp_path):
    """Red grows to the right, green downwards: a crop shows where it was taken, and which way round it is."""
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(100)[:, None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    crops, _ = epoch_of(streamed([tmp_path / "ramp.png"] * 100, batch_size=25))
    crops = torch.stack(list(crops.values()))
    red, green = crops[:, 0].mean(1), crops[:, 1].mean(2)
    mirrored = red[:, 0] > red[:, -1]
    assert 30 <= mirrored.sum() <= 70
    assert (green.diff() >= 0).all()
    widths = (red[:, 0] - red[:, -1]).abs()
    areas = widths * (green[:, -1] - green[:, 0]) / 100**2
    assert 0.03 < areas.min() < 0.3  # from 8 % of the image ...
    assert 0.7 < areas.max() <= 1  # ... to all of it
    assert red.min(1).values.unique().numel() > 20


def test_crops_and_order_depend_on_seed_epoch_and_image_alone(tmp_path):
    paths = stream_tree(tmp_path / "set", count=5)  # 20 images
    first, order = epoch_of(streamed(paths), 3)
    assert sorted(order) == list(range(20))
    assert order != sorted(order)
    for workers in (1, 2):
        batches = streamed(paths, workers=workers)
        assert not same(epoch_of(batches, 2)[0], first)  # workers that stay see the epochs change
        again, order_again = epoch_of(batches, 3)
        assert same(again, first)
        assert order_again == order
    assert same(epoch_of(streamed(paths, batch_size=7), 3)[0], first)
    other, other_order = epoch_of(streamed(paths, seed=1), 3)
    assert not same(other, first)
    assert other_order != order


def test_streaming_leaves_the_random_numbers_of_the_networks_alone(tmp_path):
    """What dropout draws would else depend on how many epochs this process has begun."""
    batches = streamed(stream_tree(tmp_path / "set", count=2), workers=1)
    state = torch.get_rng_state()
    epoch_of(batches)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("count", "sizes"), [(9, [4, 4]), (10, [4, 4, 2]), (4, [4])])
def test_last_training_batch_is_kept_unless_it_is_a_single_image(tmp_path, count, sizes):
    paths = stream_tree(tmp_path / "set")[:count]
    batches = streamed(paths)
    assert [len(targets) for _, targets in batches] == sizes
    assert (len(batches), batches.num_images) == (len(sizes), sum(sizes))
    assert sum(len(targets) for _, targets in streamed(paths, training=False)) == count


# --- damaged images


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_and_reported_once(tmp_path, capsys, damage, workers):
    paths = stream_tree(tmp_path / "set")
    paths[5].unlink()
    damage(paths[5])
    batches = streamed(paths, training=False, workers=workers)
    assert [len(targets) for _, targets in batches] == [4, 3, 4, 4, 4, 4]
    assert sorted(epoch_of(batches)[1]) == [i for i in range(24) if i != 5]
    assert list(batches.skipped.reasons) == [str(paths[5])]
    assert capsys.readouterr().out.count(f"skipping {paths[5]}, which cannot be read: ") == 1


def test_batches_that_damage_leaves_too_small_are_left_out(tmp_path):
    paths = stream_tree(tmp_path / "set")[:10]
    order = epoch_of(streamed(paths))[1]
    for position in (0, 1, 2, 9):  # one image is left of the first batch, and one of the last
        paths[order[position]].write_bytes(b"")
    assert epoch_of(streamed(paths))[1] == order[4:8]
    assert [len(targets) for _, targets in streamed(paths, training=False)] == [
        sum(path.stat().st_size > 0 for path in paths[start : start + 4]) for start in (0, 4, 8)
    ]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no batch of 2 images that can be read"):
        list(streamed(paths))
    with pytest.raises(UserError, match="none of the images to evaluate on can be read"):
        evaluate(Students([Tiny()]), streamed(paths, training=False))


def test_more_than_one_percent_of_damaged_images_stop_the_run(tmp_path):
    paths = stream_tree(tmp_path / "set")
    for path in paths[3:5]:
        path.write_bytes(b"")
    assert len(list(streamed(paths, total=200, workers=1))) == 6
    with pytest.raises(UserError, match=rf"2 of the 199 images cannot be read, more than 1%.* {paths[3]} \(no image\)"):
        list(streamed(paths, training=False, total=199, workers=1))


class Tiny(nn.Module):
    """The smallest network that has what a student needs."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 24)

    def forward_features(self, x):
        return self.norm(x)

    def forward_head(self, features):
        return self.fc(features.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("last", [False, True])
def test_scores_are_of_the_images_that_could_be_read(tmp_path, last):
    """Also where the last batch of the epoch, for which the loop might wait, turns out to be empty."""
    paths = stream_tree(tmp_path / "set")[:12]
    order = epoch_of(streamed(paths))[1]
    for target in order[8:] if last else order[:4]:
        paths[target].write_bytes(b"")
    args = options.parse("main", ["--num_students", "1", "--lambda", "0", "--lr", "1e-30", "--print_freq", "2"])
    job = Job(tmp_path / "job", args.recorded())
    job.open(None, epoch=0, reset=False)
    torch.manual_seed(0)
    trainer = Trainer(Students([Tiny()]), None, args, CPU, Execution())
    trainer.epoch = 1
    batches = streamed(paths)
    batches.set_epoch(1)
    scores = trainer.train_one_epoch(batches, job, meta={})
    job.close()

    kept = [(images, targets) for images, targets in batches]
    assert [len(targets) for _, targets in kept] == [4, 4]
    torch.manual_seed(0)
    network = Tiny()
    losses = [nn.functional.cross_entropy(network(images), targets).item() for images, targets in kept]
    assert scores.loss["total"] == pytest.approx(np.mean(losses), rel=1e-5)

    whole = [path for path in paths if path.stat().st_size]
    damaged, readable = streamed(paths, training=False), streamed(whole, training=False)
    readable.loader.dataset.split.targets[:] = [i for i, path in enumerate(paths) if path.stat().st_size]
    expected = evaluate(trainer.learner, readable)
    assert evaluate(trainer.learner, damaged).loss.students == pytest.approx(expected.loss.students)


def positioned(batches):
    for images, _ in batches:
        yield batches.position, images


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_of_streamed_images_can_begin_in_its_middle(tmp_path, workers):
    """Batches that turn out to be empty count as well."""
    paths = stream_tree(tmp_path / "set")[:12]
    for target in epoch_of(streamed(paths, batch_size=3))[1][3:6]:
        paths[target].write_bytes(b"")
    batches = streamed(paths, batch_size=3, workers=workers)
    batches.set_epoch(1)
    whole = dict(positioned(batches))
    assert list(whole) == [1, 3, 4]
    for start in range(5):
        batches.set_epoch(1, start)
        rest = dict(positioned(batches))
        assert same(rest, {position: images for position, images in whole.items() if position > start})


# --- whole runs


@pytest.mark.slow
def test_a_run_on_streamed_images_reports_what_it_skipped_and_can_be_resumed(tmp_path):
    paths = stream_tree(tmp_path / "set", count=30)  # 120 images
    truncated(paths[40])
    flags = ("--dataset", "folder", "--data_dir", tmp_path / "set", "--image_size", SIZE, "--teacher_model")
    flags += ("resnet_20", "--pretrain", "--train_batch_size", 16, "--lr_decay_step", 9, "--workers")
    output = succeed("main.py", *flags, 2, "--num_epochs", 2, "--job_dir", tmp_path / "whole")
    assert output.count("skipping") == 1
    note = f"Left out because they cannot be read: 1 of 120 images, such as {paths[40]} (image file is truncated"
    assert note in (tmp_path / "whole" / "report.md").read_text()
    report = report_of(tmp_path / "whole")
    assert list(report["skipped_images"]) == [str(paths[40])]
    assert "54 / 6 / 60 training / validation / test images of 3 x 32 x 32" in report["notes"][0]

    succeed("main.py", *flags, 1, "--num_epochs", 1, "--job_dir", tmp_path / "job")
    succeed("main.py", *flags, 1, "--num_epochs", 2, "--job_dir", tmp_path / "job", "--resume")
    weights = [
        torch.load(tmp_path / job / "checkpoint" / "last.pt", weights_only=True)["model"] for job in ("whole", "job")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    truncated(paths[41])
    error = fail("main.py", *flags, 1, "--num_epochs", 1, "--job_dir", tmp_path / "job", "--reset")
    assert "2 of the 120 images cannot be read" in error
