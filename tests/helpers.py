"""What several test files need."""

import atexit
import io
import json
import os
import resource
import struct
import subprocess
import sys
import traceback
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import finetune
import main
from model import fused
from utils import cost, options
from utils.errors import log_to
from utils.interruption import Interruption, interruption
from utils.options import completed
from utils.setup import run_script

ROOT = Path(__file__).resolve().parent.parent
BUDGET = float(os.environ.get("TEST_BUDGET", 1))  # how many times as many random cases are tried: 4 takes minutes
SCRIPTS = {"main.py": main, "finetune.py": finetune}


def run_process(script, *flags, cwd=ROOT, **environment):
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


def run(script, *flags):
    """`run_process` without the process, which costs seconds: main.py or finetune.py with the same output and bits."""
    flags, out, err = list(map(str, flags)), io.StringIO(), io.StringIO()
    with as_in_a_process([str(ROOT / script), *flags]), redirect_stdout(out), redirect_stderr(err):
        try:
            config = options.parse(script.removesuffix(".py"), flags)
            run_script(lambda: SCRIPTS[script].main(config))
            code = 0
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())


def measure_latencies_once(patch):
    """Reports hold one timed pass instead of 33, which take as long as the training of a test."""
    once = partial(cost.time_in_turn, rounds=1, warm_up=0)
    patch.setattr(cost, "time_in_turn", lambda calls, device, **_: once(calls, device))


@contextmanager
def as_in_a_process(argv):
    """Within, global state is that of a new process with one thread; afterwards, what it was before."""
    registered, threads, state = [], torch.get_num_threads(), vars(interruption).copy()

    def register(function, *args, **kwargs):
        if getattr(function, "__module__", "").startswith(("utils.", "data.")):  # a library's stay until the real end
            registered.append((function, args, kwargs))
        else:
            register_at_exit(function, *args, **kwargs)
        return function

    def unregister(function):
        registered[:] = [entry for entry in registered if entry[0] != function]
        unregister_at_exit(function)

    register_at_exit, unregister_at_exit = atexit.register, atexit.unregister
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "orig_argv", [sys.executable, *argv])
        measure_latencies_once(patch)
        patch.setattr(atexit, "register", register)
        patch.setattr(atexit, "unregister", unregister)
        patch.setattr(warnings, "showwarning", warnings._showwarning_orig)  # pytest's would not reach standard error
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        vars(interruption).update(vars(Interruption()))
        torch.set_num_threads(1)
        torch.manual_seed(67280421310721)  # that of a new process
        try:
            yield
        finally:
            for function, args, kwargs in reversed(registered):
                function(*args, **kwargs)
            log_to(None)
            fused.disable()
            torch.set_num_threads(threads)
            vars(interruption).update(state)


def succeed(script, *flags, run=run, **options):
    """`run` (or `run_process`), asserting success. Returns standard output."""
    result = run(script, *flags, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(script, *flags, run=run, **options):
    """`run` (or `run_process`), asserting that it ends as a person's mistake should: code 2, one line. Returns it."""
    result = run(script, *flags, **options)
    assert result.returncode == 2, f"exit code {result.returncode}: {result.stderr}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def report_of(job):
    return json.loads((job / "report.json").read_text())


def content_of(path):
    """The plain content of a file of weights."""
    return torch.load(path, weights_only=True)


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
        first, second = (content_of(job / "checkpoint" / name) for job in (a, b))
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


def channels_last(*size, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) + mean).contiguous(memory_format=torch.channels_last)


def random_norm(channels, seed=0):
    norm = nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(channels, generator=generator))
    norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm


def distance(value, wanted):
    """Relative, over the whole tensor: a single value near a ReLU's kink may fall on its other side by rounding."""
    return ((value.double() - wanted).norm() / wanted.double().norm().clamp_min(1e-9)).item()


def answers(network, images, meta):
    """The network's logits of images in 0 .. 1, normalized by hand."""
    mean, std = (np.float32(meta[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return network(torch.from_numpy((images - mean) / std)).numpy()
