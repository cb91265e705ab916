"""What a job_dir keeps: runs that are resumed, repeated, refused or reset."""

import shutil

import pytest
import torch

from tests.helpers import assert_same_run, content_of, fail, succeed, tensorboard_scalars

pytestmark = pytest.mark.slow


def test_same_flags_give_the_same_bits(runs, tmp_path):
    succeed("main.py", *runs.student_flags, "--job_dir", tmp_path / "again")
    assert_same_run(runs.students, tmp_path / "again")


def test_resumed_run_ends_as_one_that_was_never_interrupted(runs, tmp_path):
    """Stop after an epoch, with half a line of the next one's metrics written, and go on."""
    job = tmp_path / "job"
    schedule = ("--lr_decay_step", 1, 2)  # what the default is for three epochs
    succeed("main.py", *runs.student_flags, *schedule, "--num_epochs", 1, "--job_dir", job)
    with open(job / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "lr": 0.0')
    output = succeed("main.py", *runs.student_flags, "--resume", "--job_dir", job)
    assert "resuming after epoch 1" in output
    assert_same_run(runs.students, job)


def test_tensorboard_of_a_resumed_run_shows_every_epoch_once(runs, tmp_path):
    """Also those whose events a killed process had not written yet: they come from metrics.jsonl."""
    job = tmp_path / "job"
    schedule = ("--lr_decay_step", 1, 2)
    succeed("main.py", *runs.student_flags, *schedule, "--num_epochs", 2, "--job_dir", job)
    for path in (job / "run").rglob("events*"):
        path.write_bytes(path.read_bytes()[:300])
    succeed("main.py", *runs.student_flags, "--resume", "--job_dir", job)
    for phase in ("train", "test"):
        assert tensorboard_scalars(job / "run" / phase) == tensorboard_scalars(runs.students / "run" / phase)


def test_resume_from_another_folder_brings_its_record_along(runs, tmp_path):
    last = runs.students / "checkpoint" / "last.pt"
    output = succeed("main.py", *runs.student_flags, "--resume", last, "--job_dir", tmp_path / "job")
    assert "resuming after epoch 3" in output
    assert (tmp_path / "job" / "metrics.jsonl").read_text() == (runs.students / "metrics.jsonl").read_text()
    weights = [torch.load(job / "resnet_pruned_18.pt", weights_only=True) for job in (runs.students, tmp_path / "job")]
    assert all(torch.equal(value, weights[1]["state_dict"][key]) for key, value in weights[0]["state_dict"].items())


def test_resume_without_a_checkpoint_starts_anew(runs, tmp_path):
    output = succeed("main.py", *runs.student_flags, "--num_epochs", 1, "--resume", "--job_dir", tmp_path / "new")
    assert "no checkpoint to resume yet" in output


def test_resume_refuses_a_best_epoch_that_is_of_another_run(runs, tmp_path):
    shutil.copytree(runs.students, tmp_path / "job")
    content = content_of(tmp_path / "job" / "checkpoint" / "model_best.pt")
    content["epoch"] = 9
    torch.save(content, tmp_path / "job" / "checkpoint" / "model_best.pt")
    error = fail("main.py", *runs.student_flags, "--resume", "--job_dir", tmp_path / "job")
    assert "is of another epoch" in error


def test_resume_without_last_starts_nothing_over_a_trained_run(runs, tmp_path):
    job = tmp_path / "job"
    shutil.copytree(runs.students, job)
    (job / "checkpoint" / "last.pt").unlink()
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    error = fail("main.py", *runs.student_flags, "--resume", "--job_dir", job)
    assert f"--resume {job / 'checkpoint' / 'model_best.pt'}, delete it with --reset" in error
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before


def test_resume_with_a_damaged_record_is_refused(runs, tmp_path):
    shutil.copytree(runs.students, tmp_path / "job")
    metrics = tmp_path / "job" / "metrics.jsonl"
    metrics.write_text("garbage\n" + metrics.read_text())
    before = {path: path.read_bytes() for path in (tmp_path / "job").rglob("*") if path.is_file()}
    error = fail("main.py", *runs.student_flags, "--resume", "--workers", 1, "--job_dir", tmp_path / "job")
    assert "line 1 of" in error
    assert {path: path.read_bytes() for path in (tmp_path / "job").rglob("*") if path.is_file()} == before


def test_resume_refuses_other_flags(runs):
    error = fail("main.py", *runs.student_flags, "--lambda", 0.5, "--resume", "--job_dir", runs.students)
    assert "--lambda 0.1, not with --lambda 0.5" in error


def test_finished_job_is_refused_and_left_as_it_is(runs):
    before = {p: p.read_bytes() for p in runs.folder.rglob("*") if p.is_file()}
    for script, flags, job in (
        ("main.py", runs.student_flags, runs.students),
        ("finetune.py", runs.refine_flags, runs.refined),
    ):
        error = fail(script, *flags, "--job_dir", job)
        assert "--resume" in error
        assert "--reset" in error
    assert "--reset would delete" in fail("finetune.py", *runs.refine_flags, "--reset", "--job_dir", runs.students)
    assert {p: p.read_bytes() for p in runs.folder.rglob("*") if p.is_file()} == before


def test_reset_deletes_the_old_run_and_nothing_else(runs, tmp_path):
    job = tmp_path / "job"
    shutil.copytree(runs.students, job)
    (job / "notes.txt").write_text("mine")
    (job / "run" / "train" / "mine").write_text("mine")
    (job / ".report.md.123.tmp").write_text("unfinished")
    flags = ("--num_students", 1, "--lambda", 0, "--miu", 0, "--num_epochs", 1, "--pruned_num", 4)
    succeed("main.py", *runs.student_flags, *flags, "--reset", "--job_dir", job)
    assert not (job / ".report.md.123.tmp").exists()
    assert [path.name for path in job.glob("*.pt")] == ["resnet_pruned_4.pt"]
    assert "--miu 0 " in (job / "report.md").read_text()  # zeros are stated, too
    assert len((job / "metrics.jsonl").read_text().splitlines()) == 1
    assert (job / "notes.txt").read_text() == "mine"
    assert (job / "run" / "train" / "mine").read_text() == "mine"
    assert len(list((job / "run" / "train").glob("events*"))) == 1
