"""Image files as crops of one size: torchvision decodes JPEG files and scales uint8 tensors, Pillow reads the rest."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.images import open_image, read, reduction_below_limit, without_warnings
from data.sources import Preprocessing

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced by torchvision 0.29
    decode_jpeg = None


class Region(NamedTuple):
    """A part of an image in pixels, and the smallest size (height, width) in which it may be decoded."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]

    @property
    def reduction(self) -> int:
        """The largest factor by which a JPEG decoder can divide the sides without falling below `size`."""
        allowed = min(self.height // self.size[0], self.width // self.size[1])
        return next((factor for factor in (8, 4, 2) if factor <= allowed), 1)

    def cut(self, pixels: Tensor, factor: int = 1) -> Tensor:
        """The region of pixels (3, H, W), which are those of the image divided by a factor."""
        bottom, right = -(-(self.top + self.height) // factor), -(-(self.left + self.width) // factor)
        region = pixels[:, self.top // factor : bottom, self.left // factor : right]
        return region.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # by a quarter faster to scale than a view


class TrainingCrop:
    """ImageNet's usual augmentation: a random crop, scaled to size x size, and a random flip."""

    def __init__(self, size: int):
        self.size, self.random_crop = (size, size), v2.RandomResizedCrop(size)

    def __call__(self, path: bytes, seed: int) -> Tensor:
        """(3, size, size) uint8; the seed alone decides on crop and flip. Raises as `data.images.read` does."""

        def draw(image: Image.Image) -> Region:
            torch.default_generator.manual_seed(seed)
            return Region(**self.random_crop.make_params([image]), size=self.size)

        with torch.random.fork_rng(devices=[]):
            crop = F.resize(read_region(path, draw), self.size)
            return F.horizontal_flip(crop) if torch.rand(1) < 0.5 else crop


@dataclass
class EvaluationCrop:
    """The center of an image that is scaled as `preprocessing` says."""

    preprocessing: Preprocessing

    def __call__(self, path: bytes, seed: int) -> Tensor:
        """(3, H, W) uint8; the seed is not used. Raises as `data.images.read` does."""
        resize, interpolation = self.preprocessing.resize, v2.InterpolationMode(self.preprocessing.interpolation)
        whole = read_region(path, lambda image: Region(0, 0, image.height, image.width, resize))
        scaled = F.resize(whole, resize[:1], interpolation, antialias=self.preprocessing.antialias)
        return F.center_crop(scaled, self.preprocessing.crop)


@without_warnings()
def read_region(path: bytes, choose: Callable[[Image.Image], Region]) -> Tensor:
    """Read a region of an image file as RGB, (3, H, W) uint8.

    A region of a JPEG file that is at least twice too large is decoded at 1/2, 1/4 or 1/8 of its size.

    Args:
        choose: the region of an image that has not been decoded yet.

    Raises: as `data.images.read` does.
    """
    region, width, factor = None, 0, 1
    with suppress(Exception):  # `read` finds the reason
        with open_image(path) as image:
            region, width = choose(image), image.width
            factor = max(region.reduction, reduction_below_limit(image))
        if isinstance(image, JpegImageFile) and factor == 1 and decode_jpeg:
            with open(path, "rb") as file:
                encoded = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            return region.cut(decode_jpeg(encoded, ImageReadMode.RGB))
    image = read(path, factor)
    return (region or choose(image)).cut(F.pil_to_tensor(image), factor if image.width < width else 1)
