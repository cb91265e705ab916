"""Runs of the scripts that several tests look at."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers import succeed

torch.set_num_threads(1)  # the tests run side by side


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A pretrained teacher, two students trained with it, and the best of them refined, on the digits."""
    folder = tmp_path_factory.mktemp("runs with space")
    runs = SimpleNamespace(
        teacher=folder / "teacher", students=folder / "students", refined=folder / "refined", folder=folder, output={}
    )
    small = ("--dataset", "digits", "--teacher_model", "resnet_20", "--lr", 0.05)
    runs.student_flags = (*small, "--teacher_dir", runs.teacher, "--num_students", 2, "--num_epochs", 3)
    runs.output["teacher"] = succeed("main.py", *small, "--pretrain", "--num_epochs", 4, "--job_dir", runs.teacher)
    runs.output["students"] = succeed("main.py", *runs.student_flags, "--job_dir", runs.students)
    runs.student_file = runs.students / "resnet_pruned_18.pt"
    runs.refine_flags = ("--refine", runs.student_file, "--pruned", "--num_epochs", 2, "--lr", 0.01)
    runs.output["refined"] = succeed("finetune.py", *runs.refine_flags, "--job_dir", runs.refined)
    return runs
