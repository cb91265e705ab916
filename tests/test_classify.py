"""The script for deployed networks against the program's own evaluation, image by image."""

import json
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import data
from data import make_loaders
from data.images import read
from experiment import classify
from tests.helpers import make_tree, meta
from utils import export

TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: to be turned by 90 degrees


def photograph(path, size, kind, generator):
    """Writes a blurred random image of a mode that people have; returns its path."""
    pixels = generator.integers(0, 256, (5, 7, 4), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    gray = np.asarray(image.convert("L")).astype(np.uint16) * 250 + 99
    match kind:
        case "16-bit gray":
            return save(Image.fromarray(gray), path.with_suffix(".png"))
        case "16-bit gray, big-endian":
            return save(Image.fromarray(gray.astype(">u2")), path.with_suffix(".tif"))
        case "32-bit gray":
            return save(Image.fromarray(gray.astype(np.int32)), path.with_suffix(".tiff"))
        case "palette":
            transparency = bytes(range(0, 256, 4))
            return save(image.convert("RGB").quantize(64), path.with_suffix(".png"), transparency=transparency)
        case "turned":
            return save(image.convert("RGB"), path.with_suffix(".jpg"), exif=TURNED)
        case "CMYK":
            return save(image.convert("CMYK"), path.with_suffix(".jpg"))
        case mode:
            return save(image.convert(mode), path.with_suffix(".png"))


def save(image, path, **options):
    image.save(path, **options)
    return path


KINDS = ["16-bit gray", "16-bit gray, big-endian", "32-bit gray", "palette", "turned", "CMYK", "RGBA", "LA", "1", "RGB"]
SIZES = [(90, 60), (61, 97), (37, 37), (32, 32), (33, 200), (300, 20), (9, 12), (256, 255)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A streamed folder whose test set has every kind in every size."""
    root, generator = tmp_path_factory.mktemp("photographs") / "set", np.random.default_rng(0)
    make_tree(root, splits=("train",), classes=("eel", "two words", "Aal"))
    (root / "test" / "eel").mkdir(parents=True)
    for i, size in enumerate(SIZES):
        for j, kind in enumerate(KINDS):
            photograph(root / "test" / "eel" / f"{i} {j}", size, kind, generator)
    return data.load("folder", root, 0, image_size=32)


def write_onnx(dataset, path, network):
    content = meta() | dataset.meta
    path.write_bytes(export.to_onnx(export.fold(network, content), content))
    return str(path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3, bias=False))


@pytest.fixture(scope="module")
def file(photographs, network, tmp_path_factory):
    return write_onnx(photographs, tmp_path_factory.mktemp("onnx") / "a.onnx", network)


def evaluated(dataset):
    """The images of the test set as evaluation gets them, and their paths."""
    loader = make_loaders(dataset, 4, 7, 0, torch.device("cpu"), workers=0).test
    return torch.cat([images for images, _ in loader]), [path.decode() for path in dataset.test.images]


def test_photographs_of_any_size_and_mode_get_the_program_s_pixels_and_classes(photographs, network, file, capsys):
    images, paths = evaluated(photographs)
    assert len(paths) == len(SIZES) * len(KINDS)
    _, _, preprocessing = classify.load(file)
    prepared = np.stack([classify.prepare(classify.read(path, preprocessing), preprocessing) for path in paths])
    mean, std = (np.float32(values)[:, None, None] for values in (photographs.mean, photographs.std))
    assert np.abs((images.numpy() * std + mean) * 255 - prepared * 255).max() < 1.01  # torchvision's filter, Pillow's
    assert classify.main([file, *paths]) == 0
    with torch.no_grad():
        classes = [photographs.classes[i] for i in network(images).argmax(1)]
    assert set(classes) == set(photographs.classes)
    assert capsys.readouterr().out.splitlines() == [f"{path} {name}" for path, name in zip(paths, classes, strict=True)]


def test_images_in_memory_stay_as_they_are_and_others_are_scaled_to_cover_them(tmp_path):
    make_tree(tmp_path / "set")  # of 8 x 10 pixels
    dataset = data.load("folder", tmp_path / "set", 0)
    preprocessing = asdict(dataset.preprocessing)
    for name, expected in zip(range(6), dataset.test.images, strict=False):
        image = classify.read(str(tmp_path / "set" / "test" / "cat" / f"{name}.png"), preprocessing)
        assert np.array_equal((classify.prepare(image, preprocessing) * 255).round().transpose(1, 2, 0), expected)
    for height, width in ((80, 200), (100, 100), (4, 20)):
        ramp = np.zeros((height, width, 3), np.uint8)
        ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
        red, green, _ = classify.prepare(Image.fromarray(ramp), preprocessing) * 255
        assert red.shape == (8, 10)
        step = min(height / 8, width / 10)  # pixels of the file for one pixel
        for values, side, shown in ((red, width, 10), (green, height, 8)):
            assert values.mean() == pytest.approx((side - 1) / 2, abs=0.5)  # the center
            assert np.ptp(values) == pytest.approx(step * (shown - 1), abs=step)


def test_files_of_older_versions_drop_transparency_as_they_did(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    older = {"resize": [5, 7], "crop": [5, 7], "decoder": "pillow"}
    assert np.array_equal(classify.read(str(tmp_path / "a.png"), older), pixels[..., :3])
    white = classify.read(str(tmp_path / "a.png"), older | {"background": "white"})
    assert np.array_equal(white, read(str(tmp_path / "a.png").encode()))
    assert not np.array_equal(white, pixels[..., :3])


def test_images_that_cannot_be_read_are_named_and_the_others_classified(photographs, file, tmp_path, capsys):
    good = photographs.test.images[0].decode()
    (tmp_path / "text.png").write_text("text")
    paths = [str(tmp_path / "none.png"), str(tmp_path / "text.png"), good]
    assert classify.main([file, *paths]) == 2
    output, errors = capsys.readouterr()
    assert [line.startswith(good) for line in output.splitlines()] == [True]
    assert [line.startswith(f"error: {path}: ") for path, line in zip(paths, errors.splitlines(), strict=False)] == [
        True, True
    ]  # fmt: skip


class Overflowing(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * 1e38 * 1e38


def test_logits_that_are_not_finite_are_no_class(photographs, tmp_path, capsys):
    overflowing = write_onnx(photographs, tmp_path / "a.onnx", Overflowing())
    assert classify.main([overflowing, photographs.test.images[0].decode()]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.endswith(": its logits are not finite\n")


def forgotten(content):
    del content["preprocessing"]


def of_a_newer_version(content):
    content["preprocessing"] = json.dumps(json.loads(content["preprocessing"]) | {"decoder": "other"})


def with_another_step(content):
    content["preprocessing"] = json.dumps(json.loads(content["preprocessing"]) | {"rotate": 90})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forgotten, r"export it again, with finetune\.py --refine STUDENT\.pt --pruned --test_only --export onnx"),
        (of_a_newer_version, "wants decoder = other"),
        (with_another_step, "wants rotate = 90"),
    ],
)
def test_a_file_that_it_cannot_follow_is_refused(file, tmp_path, change, message):
    model = onnx.load(file)
    content = {entry.key: entry.value for entry in model.metadata_props}
    change(content)
    onnx.helper.set_model_props(model, content)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=message):
        classify.load(str(tmp_path / "a.onnx"))


def test_what_is_no_onnx_file_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "a.onnx").write_text("nothing\nof the kind")
    for path in (tmp_path / "a.onnx", tmp_path / "none.onnx"):
        assert classify.main([str(path), "image.png"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path} cannot be run: ")
