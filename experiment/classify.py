"""Classify image files with an exported ONNX file.

    python experiment/classify.py experiment/digits/exported/resnet_pruned_18.onnx IMAGE ...

Prints the path and the class of each image, which is read and scaled as the file's metadata says, so that its class is
the one that it has in evaluation. Needs NumPy, Pillow and ONNX Runtime, but nothing of this project: this script can be
copied to where the network is deployed.
"""

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

# Values of the metadata's preprocessing that this file can follow; of sizes, any.
KNOWN = {
    "resize": None,
    "crop": None,
    "interpolation": [name.lower() for name in Image.Resampling.__members__],
    "antialias": [True],
    "decoder": ["pillow", "torchvision"],
    "filter": ["pillow", "torchvision"],  # theirs differ by at most 1
    "background": ["white"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.onnx")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    args = parser.parse_args(arguments)
    try:
        session, classes, preprocessing = load(args.file)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = 0
    for path in args.images:
        try:
            image = prepare(read(path, preprocessing), preprocessing)
            (logits,) = session.run(["logits"], {"images": image[None]})[0]
            if not np.isfinite(logits).all():
                raise ValueError("its logits are not finite")
        except Exception as error:  # a damaged image can raise anything
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
            print(f"error: {path}: {problem}", file=sys.stderr)
            code = 2
        else:
            print(path, classes[logits.argmax()])
    return code


def load(file: str) -> tuple[onnxruntime.InferenceSession, list[str], dict[str, Any]]:
    """The network, the names of its classes, and how its images are prepared.

    Raises:
        ValueError: it is no ONNX file, or does not say how in terms that are known here.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{file} cannot be run: {' '.join(str(error).split())}") from error
    meta = session.get_modelmeta().custom_metadata_map
    if "preprocessing" not in meta:
        raise ValueError(
            f"{file} does not say how its images are prepared: export it again, with finetune.py --refine STUDENT.pt "
            "--pruned --test_only --export onnx"
        )
    preprocessing = json.loads(meta["preprocessing"])
    for key, value in preprocessing.items():
        if key not in KNOWN or (KNOWN[key] and value not in KNOWN[key]):
            raise ValueError(
                f"{file} wants {key} = {value}, which this program does not know: take a newer classify.py"
            )
    return session, json.loads(meta["classes"]), preprocessing


def read(path: str, preprocessing: dict[str, Any]) -> Image.Image:
    """As RGB, like data/images.py: 16-bit gray is scaled, EXIF's orientation not applied.

    Files of older versions have no background: transparency is dropped, as it was then.
    """
    background = preprocessing.get("background")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(path, preprocessing) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, whose range is unknown")
            if image.mode.startswith("I"):
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError("its pixels are not of 8 or 16 bits")
                gray = values // (1 if image.mode == "I" and values.max() <= 255 else 257)
                if background:
                    gray[values == image.info.get("transparency", -1)] = 255
                return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
            if background and image.has_transparency_data:
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
            return image.convert("RGB")


def open_image(path: str, preprocessing: dict[str, Any]) -> Image.Image:
    """As Image.open, but a JPEG file that is too large is set to be decoded at 1/2, 1/4 or 1/8 of its size.

    It is if it has more pixels than Pillow's limit or, with the decoder "torchvision", at least twice those that are
    needed on each side.
    """
    try:
        image = JpegImageFile(path)  # of any size
    except SyntaxError:  # no JPEG file
        image = Image.open(path)
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    height, width = preprocessing["resize"] if preprocessing["decoder"] == "torchvision" else image.size[::-1]
    spare = min(image.width // width, image.height // height)
    needed = next((factor for factor in (1, 2, 4) if pixels <= limit * factor**2), 8)
    if needed > 1 and not isinstance(image, JpegImageFile):
        raise ValueError(f"{pixels:,} pixels are more than Pillow's limit of {limit:,}")
    factor = max(needed, *(factor for factor in (1, 2, 4, 8) if factor <= max(spare, 1)))
    image.draft(None, (image.width // factor, image.height // factor))
    return image


def prepare(image: Image.Image, preprocessing: dict[str, Any]) -> np.ndarray:
    """(3, H, W) float32 in 0 .. 1: the center of the image, scaled until it just covers a size."""
    (height, width), (rows, columns) = preprocessing["resize"], preprocessing["crop"]
    if image.size != (columns, rows) or width > columns or height > rows:
        if image.width * height <= width * image.height:
            size = width, int(width * image.height / image.width)
        else:
            size = int(height * image.width / image.height), height
        image = image.resize(size, Image.Resampling[preprocessing["interpolation"].upper()])
        left, top = (round((side - cut) / 2) for side, cut in zip(size, (columns, rows), strict=True))
        image = image.crop((left, top, left + columns, top + rows))  # black beyond the image
    return np.asarray(image).transpose(2, 0, 1) / np.float32(255)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters of paths and classes
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it silently
    sys.exit(main())
