"""Flags, shapes and sizes of any kind: a run ends with a whole report or in one line."""

import contextlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import finetune
import main
from tests.helpers import BUDGET, measure_latencies_once, report_of
from utils import options
from utils.checkpoint import load_student
from utils.errors import UserError

pytestmark = pytest.mark.slow
SETTINGS = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


def mostly(usual, *others):
    return st.sampled_from([usual] * 2 * len(others) + list(others))


SIZES = st.one_of(st.integers(1, 16), st.sampled_from([17, 31, 32]))
DATA = st.fixed_dictionaries(
    {
        "classes": mostly(2, 1, 3, 5),
        "images": mostly(3, 0, 1, 2),
        "tests": st.integers(0, 2),
        "height": SIZES,
        "width": SIZES,
    }
)
FLAG = {
    "num_students": st.integers(1, 8),
    "train_batch_size": st.sampled_from([2, 3, 7, 1000]),
    "eval_batch_size": st.sampled_from([1, 4, 1000]),
    "val_size": st.sampled_from([0, 0.01, 0.1, 0.3, 1, 2, 50]),
    "lambda": mostly(0.8, 0, 1e6),
    "lr": mostly(0.1, 1e-30, 1e30),
    "momentum": st.sampled_from([0, 0.9]),
    "weight_decay": mostly(2e-4, 0, 1e30),
    "temperature": mostly(4, 1e-30, 1, 1000),
    "kl_reduction": st.sampled_from(["batchmean", "element"]),
    "scheduler": st.sampled_from(["step", "cosine"]),
    "warmup_epochs": mostly(1, 0, 1.7e308),
    "pruned_num": mostly(18, 0, 1, 17, 19),
}
FLAGS = st.fixed_dictionaries(FLAG)
CONV = st.one_of(
    st.fixed_dictionaries({"conv": st.sampled_from(["depthwise", "shift"])}),
    st.fixed_dictionaries({"conv": st.just("group"), "groups": mostly(4, 1, 16, 17)}),
)
NORMAL = {
    "num_students": 2, "train_batch_size": 1000, "eval_batch_size": 1000, "val_size": 1, "lambda": 0.8, "lr": 0.1,
    "momentum": 0.9, "weight_decay": 2e-4, "temperature": 4, "kl_reduction": "batchmean", "scheduler": "step",
    "warmup_epochs": 1, "pruned_num": 18,
}  # fmt: skip
SHIFT = {"conv": "shift"}


@contextlib.contextmanager
def folder():
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


def make_set(root, classes, images, tests, height, width):
    """A tree of random images, root/{train,test}/<class>/N.png; the last class may have more."""
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("test", tests)):
        for i in range(classes):
            directory = root / split / f"{i:04}"
            directory.mkdir(parents=True)
            for j in range(count + (i == classes - 1)):
                Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(directory / f"{j}.png")


def run(script, flags):
    """Run a script in this process. Whether it ran to its end; a line for a person is the only other good end."""
    argv = [text for name, value in flags.items() for text in (f"--{name}", *([str(value)] if value != "" else []))]
    try:
        args = options.parse(script, argv)
        (main if script == "main" else finetune).main(args)
    except (SystemExit, UserError) as error:
        refusal = error
    else:
        assert_is_whole(flags["job_dir"])
        return True
    assert isinstance(refusal, UserError) or refusal.code == 2
    assert "malformed" not in str(refusal)  # of what it wrote itself
    assert not (flags["job_dir"] / "report.json").exists()
    return False


def assert_is_whole(job):
    """A report of finite numbers, that JSON and a reader of the file understand."""
    content = report_of(job)
    assert json.dumps(content, allow_nan=False)
    assert "nan" not in (job / "report.md").read_text().split("- `")[0]
    for network in content["networks"]:
        for split in ("val", "test"):
            assert network[split] is None or 0 <= network[split] <= 100
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in network["ratios"].values())
    assert content["best"]["accuracy"] is not None
    (exported,) = job.glob("*.pt")
    assert load_student(exported)[1]["num_classes"] == len(content["meta"]["classes"])


@pytest.fixture(autouse=True)
def quick_latencies(monkeypatch):
    measure_latencies_once(monkeypatch)


def test_main_ends_well():
    outcomes = []

    @settings(max_examples=int(8 * BUDGET), **SETTINGS)
    @given(data=DATA, flags=FLAGS, conv=CONV)
    @example({"classes": 1000, "images": 1, "tests": 0, "height": 1, "width": 1}, NORMAL, SHIFT)
    @example({"classes": 2, "images": 2, "tests": 1, "height": 64, "width": 64}, NORMAL, SHIFT)
    @example({"classes": 3, "images": 3, "tests": 1, "height": 2, "width": 9}, NORMAL | {"num_students": 8}, SHIFT)
    def check(data, flags, conv):
        with folder() as top:
            make_set(top / "set", **data)
            where = {"dataset": "folder", "data_dir": top / "set", "job_dir": top / "job", "compile": "off"}
            fixed = where | {"num_epochs": 1, "teacher_model": "resnet_20"}
            outcomes.append(run("main", fixed | flags | conv))

    check()
    assert 0.3 * len(outcomes) < sum(outcomes) < len(outcomes)


def test_refinement_ends_well():
    """Of a student that a run exported, with images of the same classes in other sizes and numbers."""
    outcomes = []
    sizes = {"height": SIZES, "width": SIZES, "images": st.integers(1, 4), "tests": st.integers(0, 2)}
    names = ("train_batch_size", "eval_batch_size", "momentum", "weight_decay", "scheduler", "warmup_epochs", "lr")
    with folder() as top:
        make_set(top / "set", 2, 3, 1, 8, 8)
        data = {"dataset": "folder", "data_dir": top / "set", "job_dir": top / "job", "num_epochs": 1, "compile": "off"}
        assert run("main", data | {"teacher_model": "resnet_20"} | NORMAL)

        @settings(max_examples=int(4 * BUDGET), **SETTINGS)
        @given(data=st.fixed_dictionaries(sizes), flags=st.fixed_dictionaries({name: FLAG[name] for name in names}))
        def check(data, flags):
            with folder() as other:
                make_set(other / "set", classes=2, **data)
                where = {"dataset": "folder", "data_dir": other / "set", "job_dir": other / "job", "compile": "off"}
                refine = {"refine": top / "job" / "resnet_pruned_18.pt", "pruned": "", "num_epochs": 1}
                outcomes.append(run("finetune", where | refine | flags))

        check()
    assert 0.3 * len(outcomes) < sum(outcomes)
