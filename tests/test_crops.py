"""Crops of image files against Pillow's decoder and torchvision's transforms of Pillow's images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from data import crops
from data.crops import EvaluationCrop, Region, TrainingCrop, read_region
from data.images import DamagedImage
from data.sources import Preprocessing

SIZE = 32
PREPROCESSING = Preprocessing((37, 37), (SIZE, SIZE))
ENCODINGS = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "without subsampling": ("RGB", {"subsampling": 0}),
    "stored as RGB": ("RGB", {"keep_rgb": True}),
    "gray": ("L", {}),
    "CMYK": ("CMYK", {}),
}


def photograph(path, size, mode="RGB", **options):
    """Writes a blurred random image; returns its path as bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path, **options)
    return str(path).encode()


def whole(image):
    return Region(0, 0, image.height, image.width, (image.height, image.width))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_jpeg_files_have_pillow_s_pixels(tmp_path, encoding):
    mode, options = ENCODINGS[encoding]
    path = photograph(tmp_path / "a.jpg", (53, 47), mode, **options)
    assert torch.equal(read_region(path, whole), pil_to_tensor(Image.open(path).convert("RGB")))


def test_a_region_is_cut_from_any_file(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = photograph(tmp_path / name, (53, 47))
        region = read_region(path, lambda image: Region(3, 5, 20, 30, (20, 30)))
        assert torch.equal(region, pil_to_tensor(Image.open(path).crop((5, 3, 35, 23))))


@pytest.mark.parametrize("size", [(53, 47), (60, 30), (20, 31)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_seed_chooses_the_crop_and_flip_of_torchvision_s_transforms(tmp_path, name, size):
    path = photograph(tmp_path / name, size)
    image = Image.open(path)
    reference = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    ours, state = TrainingCrop(SIZE), torch.get_rng_state()
    for seed in range(10):
        crop = ours(path, seed)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert (crop.int() - reference(image).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("size", "factor"), [((73, 90), 1), ((74, 149), 2), ((147, 200), 2), ((149, 149), 4), ((400, 300), 8)]
)
def test_photographs_at_least_twice_too_large_are_decoded_scaled(tmp_path, size, factor):
    path = photograph(tmp_path / "a.jpg", size, quality=95)
    image = Image.open(path)
    image.draft(None, (37, 37))
    assert image.size == tuple(-(-side // factor) for side in size)
    reference = v2.Compose([v2.Resize(37), v2.CenterCrop(SIZE), v2.PILToTensor()])
    crop = EvaluationCrop(PREPROCESSING)(path, 0)
    assert (crop.int() - reference(image).int()).abs().max() <= 1


def test_the_crop_of_a_scaled_photograph_shows_the_same_part(tmp_path):
    """Red grows to the right, green downwards."""
    ramp = np.zeros((250, 250, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(250), np.arange(250)[:, None]
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    paths = [str(tmp_path / name).encode() for name in ("a.jpg", "a.png")]
    for read, seeds in ((TrainingCrop(SIZE), 20), (EvaluationCrop(PREPROCESSING), 1)):
        for seed in range(seeds):
            scaled, expected = (read(path, seed).int() for path in paths)
            assert (scaled - expected).abs().max() <= 10  # a pixel at 1/4 is 4 pixels of the file


def test_pillow_reads_what_torchvision_cannot_decode(tmp_path, monkeypatch):
    path = photograph(tmp_path / "a.jpg", (53, 47))
    expected = read_region(path, whole)
    for decoder in (None, lambda *_: 1 / 0):
        monkeypatch.setattr(crops, "decode_jpeg", decoder)
        assert torch.equal(read_region(path, whole), expected)
    monkeypatch.undo()
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    with pytest.raises(DamagedImage, match=r"image file is truncated \(\d+ bytes not processed\)"):
        read_region(path, whole)


def test_more_pixels_than_pillow_s_limit_are_read_if_they_are_few_at_the_scale(tmp_path, monkeypatch):
    path = photograph(tmp_path / "a.jpg", (160, 160))
    expected = EvaluationCrop(PREPROCESSING)(path, 0)
    for limit in (160 * 50, 160 * 100):  # Pillow opens no file of more than twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert torch.equal(EvaluationCrop(PREPROCESSING)(path, 0), expected)
    assert read_region(path, whole).shape == (3, 80, 80)
    corner = Region(80, 80, 80, 80, (80, 80))  # of the image as it is
    assert torch.equal(read_region(path, lambda _: corner), read_region(path, whole)[:, 40:, 40:])
    photograph(tmp_path / "a.png", (160, 160))
    with pytest.raises(DamagedImage, match="160 x 160 pixels are more than Pillow's limit: scale it down"):
        read_region(str(tmp_path / "a.png").encode(), whole)
