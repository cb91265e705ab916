"""What a report says of numbers that cannot be relied upon."""

import json
import re
import shlex
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import finetune
import main
from data.loader import Batches
from data.sources import Split
from model.online import Students
from tests.helpers import make_tree, report_of
from utils import checkpoint, options, report, tables
from utils.cost import Cost, Latency, forward_pass, latency
from utils.errors import UserError
from utils.job import Job
from utils.metrics import Accuracy, accuracy, evaluate
from utils.tables import PYTORCH, Row, draw, plot_curves
from utils.teacher import check_accuracy

CPU = torch.device("cpu")


class FirstPixel(nn.Module):
    """Two logits: the value of the first pixel, or what replaces 0, and its negative."""

    def __init__(self, zero=0.0):
        super().__init__()
        self.zero = zero

    def forward(self, x):
        value = x[:, 0, 0, 0].where(x[:, 0, 0, 0] != 0, self.zero)
        return torch.stack([value, -value], dim=1)


def batches(*pixels, batch_size=2):
    images = np.zeros((len(pixels), 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = pixels
    return Batches(Split(images, np.zeros(len(pixels), np.int64)), batch_size, (0, 0, 0), (1, 1, 1), CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_network_with_any_logit_that_is_not_finite_has_no_accuracy(value):
    """Though argmax finds a class in its answers, and the right one in some; another network is not affected."""
    scores = evaluate(Students([FirstPixel(value), FirstPixel(1.0)]), batches(5, 0, 7))
    broken, sound = scores.accuracy.students
    assert np.isnan(broken)
    assert sound == 100
    assert accuracy(FirstPixel(value), batches(5, 6, 7)).top1 == 100


def test_a_teacher_whose_logits_are_not_finite_is_refused_by_force_too():
    with pytest.raises(UserError, match="not finite"):
        check_accuracy(FirstPixel(float("nan")), batches(5, 0), np.zeros(2, np.int64), force=True)


def test_accuracies_that_are_none_are_said_to_be():
    row = Row("student 1", "student", Cost(1, 1), Accuracy(50.0), Accuracy(float("nan")))
    (entry,) = tables.as_json([row])
    assert (entry["val"], entry["test"]) == (50.0, None)
    assert json.dumps(entry, allow_nan=False)
    assert report.not_finite([row]) == [
        "The logits of student 1 are not finite on some test images, so it has no accuracy."
    ]


class Unsteady(nn.Module):
    """Takes 20 ms more every other time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        time.sleep(0.001 if self.calls % 2 else 0.021)
        return x


def test_the_spread_of_a_latency_tells_that_it_is_unsteady():
    (unsteady,) = latency([forward_pass(Unsteady(), torch.zeros(1, 3, 2, 2), CPU)], CPU)
    assert unsteady.spread > tables.UNSTEADY


def test_unsteady_latencies_are_marked_and_explained():
    row = Row("a", "standard", Cost(1, 10**6))
    row.latencies = {(PYTORCH, 1): Latency(2.0, 0.8), (PYTORCH, 256): Latency(9.0, 0.1)}
    lines = tables.markdown(tables.measurements([row])).splitlines()[-2:]
    assert lines == ["| PyTorch, batch 1 | 2.00 ms (unsteady) |", "| PyTorch, batch 256 | 9.00 ms |"]
    (note,) = report.unsteady([row])
    assert "more than 50%" in note
    assert "the worst by 80%" in note
    row.latencies[PYTORCH, 1] = Latency(2.0, 0.5)
    assert report.unsteady([row]) == []


@pytest.fixture
def tree(tmp_path):
    """Three classes, of which the test set lacks one, and has the training images of another."""
    make_tree(tmp_path / "set", classes=("cat", "dog", "eel"), size=(4, 4))
    for image in (tmp_path / "set" / "test" / "eel").iterdir():
        image.unlink()
    shutil.copytree(tmp_path / "set" / "train" / "dog", tmp_path / "set" / "test" / "dog", dirs_exist_ok=True)
    return tmp_path


def student(tree, job, *flags):
    data = ("--dataset", "folder", "--data_dir", tree / "set", "--teacher_model", "resnet_20", "--num_students", 1)
    args = (*data, "--num_epochs", 1, "--lambda", 0, "--compile", "off", "--job_dir", tree / job, *flags)
    main.main(options.parse("main", list(map(str, args))))
    return tree / job


@pytest.mark.slow
def test_missing_classes_are_named_and_test_images_that_were_trained_on_counted(tree):
    notes = report_of(student(tree, "job", "--val_size", 2))["notes"]
    text = (tree / "job" / "report.md").read_text()
    assert "No test image is of these classes, so there is no accuracy for them: eel." in notes
    assert sum("No validation image is of these classes" in note for note in notes) == 1
    assert not any("No training image" in note for note in notes)
    assert all(f"- {note}" in text for note in notes)
    (repeated,) = [note for note in notes if "training images are pixel by pixel in the test set, too" in note]
    assert re.match(r"[4-6] of 16 ", repeated)  # of 6 dogs, as validation leaves them
    assert repeated in (tree / "job" / "logger.log").read_text()
    (command,) = re.findall("^```sh\npython main.py (.*)\n```$", text, re.MULTILINE)
    recorded = options.parse("main", shlex.split(command)).recorded()
    assert recorded == json.loads((tree / "job" / "config.json").read_text()) | {"arch": None, "pruned_num": None}


@pytest.mark.slow
def test_a_student_with_logits_that_are_not_finite_is_not_refined(tree):
    """Finite weights that compute NaN: a variance below zero."""
    job = student(tree, "job")
    content = checkpoint.load(job / "resnet_pruned_18.pt")
    content.state_dict["bn1.running_var"].fill_(-1)
    checkpoint.save(tree / "broken.pt", content)
    flags = ("--refine", tree / "broken.pt", "--pruned", "--num_epochs", 1, "--job_dir", tree / "refined")
    with pytest.raises(UserError, match="not finite on the validation set"):
        finetune.main(options.parse("finetune", list(map(str, flags))))


def test_curves_that_cannot_be_drawn_are_no_error(tmp_path, monkeypatch, capsys):
    """As where matplotlib finds no folder that can be written."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    job = Job(tmp_path / "job", {"pretrain": True, "teacher_model": "resnet_20"})
    draw(job.curves, (11, 4.2), plot_curves)
    assert "curves.png is not drawn" in capsys.readouterr().out
    assert not job.curves.exists()
