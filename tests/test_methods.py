"""--method from start to end: which networks each trains, on which terms, and that it learns."""

import json

import pytest
import torch

from tests.helpers import content_of, report_of, succeed
from utils.checkpoint import best_student

pytestmark = pytest.mark.slow

FLAGS = ("--dataset", "digits", "--teacher_model", "resnet_20", "--num_epochs", 2, "--lr", 0.05)
ENSEMBLE = ["student 1", "student 2", "online teacher"]


@pytest.mark.parametrize(
    ("flags", "networks", "terms"),
    [
        (("--method", "scratch"), ["student 1"], {"ce_students"}),
        (("--method", "kd", "--teacher_dir"), ["student 1"], {"ce_students", "kl_pretrained"}),
        (("--method", "dml", "--num_students", 2), ["student 1", "student 2"], {"ce_students", "kl_online"}),
        (("--method", "one", "--num_students", 2), ENSEMBLE, {"ce_students", "ce_teacher", "kl_online"}),
        (("--method", "kdcl", "--num_students", 2), ["student 1", "student 2"], {"ce_students", "kl_online"}),
        (("--detach_teacher", "--num_students", 2), ENSEMBLE, {"ce_students", "ce_teacher", "kl_online"}),
    ],
)
def test_method_trains_its_networks_on_its_terms(runs, tmp_path, flags, networks, terms):
    flags = (*flags, runs.teacher) if flags[-1] == "--teacher_dir" else flags
    job = tmp_path / "job"
    succeed("main.py", *FLAGS, *flags, "--job_dir", job)
    rows = [row["name"].removesuffix(", best") for row in report_of(job)["networks"]]
    assert rows == ["resnet_20, standard", *networks]
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]["train"]["loss"]) == {"total", *terms}
    first, second = (line["train"]["loss"]["ce_students"] for line in lines)
    assert second < first


def test_a_method_without_a_teacher_may_be_compared_with_one(runs, tmp_path):
    output = succeed(
        "main.py", *FLAGS, "--method", "scratch", "--teacher_dir", runs.teacher, "--job_dir", tmp_path / "job"
    )
    assert "on the validation set, only to compare with" in output
    assert report_of(tmp_path / "job")["networks"][0]["val"] is not None


def test_the_leader_of_diverse_peers_is_exported(tmp_path):
    """At the end, and also from a training checkpoint."""
    job, flags = tmp_path / "job", (*FLAGS, "--method", "okddip", "--num_students", 3)
    succeed("main.py", *flags, "--job_dir", job)
    report = report_of(job)
    names = [row["name"] for row in report["networks"]]
    assert names == ["resnet_20, standard", "peer 1", "peer 2", "leader"]
    assert [row["name"] for row in report["networks"] if row["exported"]] == ["leader"]
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]["train"]["loss"]) == {"total", "ce_students", "kl_online"}
    assert report["best"]["accuracy"] == max(line["val"]["accuracy"]["students"][2] for line in lines)

    last = job / "checkpoint" / "last.pt"
    best = content_of(last.with_name("model_best.pt"))["model"]
    assert_leads(content_of(job / "resnet_pruned_18.pt")["state_dict"], best)
    assert_leads(best_student(last)[0].state_dict(), content_of(last)["model"])
    output = succeed("main.py", *flags, "--job_dir", job, "--test_only")
    assert [line.partition(":")[0] for line in output.splitlines()] == ["peer 1", "peer 2", "leader"]


def assert_leads(student, weights):
    """The student is the third one of these weights."""
    assert all(torch.equal(value, weights[f"students.2.{key}"]) for key, value in student.items())
