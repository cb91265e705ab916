"""Files that an earlier version (commit 78c13b8) wrote are read, evaluated, resumed and refined.

tests/earlier_version/ holds the job_dir of a run that ended after epoch 1 of 2, and the student that the same run
exported at its end.
"""

import json
import shutil

import pytest

import data
from data import make_loaders
from tests.helpers import ROOT, succeed, tensorboard_scalars
from utils.checkpoint import load_student
from utils.metrics import accuracy

FOLDER = ROOT / "tests" / "earlier_version"
STUDENT = FOLDER / "resnet_pruned_18.pt"
NETWORKS = ("--dataset", "digits", "--teacher_model", "resnet_20", "--conv", "shift", "--num_students", 1)
TRAINING = ("--lambda", 0.1, "--num_epochs", 2, "--train_batch_size", 32, "--lr", 0.05, "--seed", 1)
SCHEDULE = ("--lr_decay_step", 1, 1)  # its default for two epochs
COMPUTED = ("--device", "cpu", "--precision", "fp32", "--compile", "off")


def test_exported_student_is_as_accurate_as_it_was():
    student, meta = load_student(STUDENT)
    assert type(meta) is dict
    assert meta["accuracy"]["test"] == 67.5
    assert meta["config"]["lambda"] == 0.1
    dataset = data.load("digits", None, meta["config"]["val_size"])
    test = make_loaders(dataset, 32, 100, seed=0, device="cpu", workers=1).test
    assert accuracy(student, test).top1 == pytest.approx(67.5, abs=0.6)  # two images that are close to the boundary


@pytest.mark.slow
def test_job_is_resumed_to_its_end(tmp_path):
    job = tmp_path / "job"
    shutil.copytree(FOLDER / "job", job)
    before = (job / "metrics.jsonl").read_text()
    output = succeed("main.py", *NETWORKS, *TRAINING, *SCHEDULE, *COMPUTED, "--resume", "--job_dir", job)
    assert "resuming after epoch 1" in output
    assert (job / "metrics.jsonl").read_text().startswith(before)
    epochs = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert epochs[1]["val"]["accuracy"]["students"][0] == pytest.approx(65.97, abs=5)
    assert tensorboard_scalars(job / "run" / "test")["accuracy/student_1"].keys() == {1, 2}
    assert load_student(job / "resnet_pruned_18.pt")[1]["inputs"] == load_student(STUDENT)[1]["inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(STUDENT, "--pruned"), (FOLDER / "job" / "checkpoint" / "last.pt",)])
def test_student_is_refined(flags, tmp_path):
    succeed("finetune.py", "--refine", *flags, "--num_epochs", 1, "--lr", 0.01, "--job_dir", tmp_path)
    _, meta = load_student(tmp_path / "resnet_pruned_18.pt")
    assert len(meta["history"]) == 1
    assert meta["start"] == f"from {flags[0]}"
