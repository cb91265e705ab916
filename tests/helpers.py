"""What several test files need."""

import json
import os
import resource
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.checkpoint import load_checkpoint
from utils.config import completed

ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags, cwd=ROOT, **environment):
    """Run a script of the project in a process of its own, as a user would; one thread, to the bit reproducible."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def succeed(script, *flags, **options):
    """`run`, asserting success. Returns standard output."""
    result = run(script, *flags, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(script, *flags, **options):
    """`run`, asserting that it ends as a person's mistake should: code 2 and one line, which is returned."""
    result = run(script, *flags, **options)
    assert result.returncode == 2, f"exit code {result.returncode}: {result.stderr}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def report_of(job):
    return json.loads((job / "report.json").read_text())


def meta(model="resnet_20_sparse", num_students=1, **changes):
    """What a file of weights says of its network, as main.py writes it."""
    network = {"arch": "resnet", "model": model, "num_classes": 10, "conv": "group", "groups": 8, "pruned_num": 5}
    data = {"classes": list("abcdefghij"), "input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    config = {"dataset": "digits", "data_dir": None, "val_size": 0.1, "teacher_model": "resnet_20", "lambda": 0.8}
    config |= {"arch": "resnet", "student_model": "resnet_20_sparse", "num_students": num_students, "pretrain": False}
    return network | data | {"config": completed(config)} | changes


def tensorboard_scalars(folder):
    """{tag: {step: value}} of a tensorboard folder, read from its records by hand."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def assert_same_run(a, b):
    """Two jobs ended alike to the bit: weights, optimizer, metrics, exported network and tensorboard."""
    for name in ("last.pt", "model_best.pt"):
        first, second = (load_checkpoint(job / "checkpoint" / name) for job in (a, b))
        assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
        momenta = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()] for c in (first, second)]
        assert all(torch.equal(p, q) for p, q in zip(*momenta, strict=True))
        for key in ("epoch", "progress", "scores", "best"):
            assert first[key] == second[key]
        assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    networks = [torch.load(job / "resnet_pruned_18.pt", weights_only=True)["state_dict"] for job in (a, b)]
    assert all(torch.equal(value, networks[1][key]) for key, value in networks[0].items())
    for phase in ("train", "test"):
        assert tensorboard_scalars(a / "run" / phase) == tensorboard_scalars(b / "run" / phase)


@contextmanager
def open_files_used_up():
    """Within, this process can open no more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno(), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def make_tree(root, splits=("train", "test"), classes=("cat", "dog"), count=6, size=(10, 8), mode="RGB"):
    """Write random PNG images, root/<split>/<class>/N.png; returns them as {(split, class): (count, H, W, 3)}."""
    generator = np.random.default_rng(0)
    images = {}
    for split in splits:
        for name in classes:
            directory = root / split / name
            directory.mkdir(parents=True)
            pixels = generator.integers(0, 256, (count, size[1], size[0], 3), np.uint8)
            for i, image in enumerate(pixels):
                Image.fromarray(image).convert(mode).save(directory / f"{i}.png")
            images[split, name] = pixels
    return images
